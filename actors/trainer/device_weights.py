"""A trainer rank's weights for rollout replicas on GPUs of the same node, from one update to the next.

Between two updates the parameters on the GPU are the version: they are offered as they are, without a copy. A receiver
asks when it is at its boundary, and is sent buckets by a thread and stream of their own while the trainer goes on
reading its parameters. Before anything changes them the offer is withdrawn, which waits for what is on its way (some
milliseconds). Who asks later is refused, and loads the host copy.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from channels.endpoint import Endpoint
from channels.errors import ChannelError
from channels.messages import Message
from channels.tensors.errors import DeviceError
from channels.weights.device_messages import (
    DeviceWeightsAsked,
    DeviceWeightsRefused,
    WeightsBucket,
    WeightsBucketTaken,
)
from channels.weights.versions import VersionName

if TYPE_CHECKING:
    import torch

    from channels.tensors.devices import Device
    from channels.weights.device import DevicePublisher

TIMEOUT_S = 10.0  # for a receiver to take a bucket; the next update waits no longer for it

log = logging.getLogger(__name__)


class DeviceWeights:
    """See the module docstring. On the loop, but for `offer`.

    make_device: gives the GPU, when something is first offered    dtype: that is published
    useless: why nothing can be offered, for good; empty while something may    rank: of the trainer's num_ranks
    """

    def __init__(
        self,
        endpoint: Endpoint,
        make_device: "Callable[[], Device]",
        *,
        dtype: str,
        rank: int,
        num_ranks: int,
    ) -> None:
        self._endpoint = endpoint
        self._make_device = make_device
        self._dtype, self._rank, self._num_ranks = dtype, rank, num_ranks
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._gpu: tuple[Device, DevicePublisher] | None = None
        self._stream: Any = None  # of the thread
        # The version, its tensors, and the event after which they are it.
        self._offered: tuple[VersionName, Mapping[str, torch.Tensor], Any] | None = None
        self._asked: dict[str, VersionName] = {}
        self._serving: asyncio.Task[None] | None = None
        self.useless = ""

    def offer(self, version: VersionName, tensors: "Mapping[str, torch.Tensor]") -> None:
        """From now on these can be had. In the thread that has computed them, before anybody hears of the version."""
        try:
            device = self._ready()[0]
        except DeviceError as error:
            self.useless = str(error)
            log.warning("weights go by way of the host: %s", error)
            return
        updated = device.event()
        updated.record(device.stream())
        self._offered = version, tensors, updated

    async def withdraw(self) -> None:
        """The parameters are about to change: returns when nobody is sent them any more."""
        self._offered = None
        if self._serving is not None:
            await self._serving

    def received(self, sender: str, message: Message) -> None:
        """Take what a receiver said."""
        match message:
            case WeightsBucketTaken() if self._gpu is not None:
                self._gpu[1].taken(sender, message)
            case DeviceWeightsAsked():
                self._asked[sender] = message.run_attempt, message.policy_version
                if self._serving is None:
                    self._serving = asyncio.create_task(self._serve(), name="weights")

    def peer_gone(self, peer: str) -> None:
        """A receiver's process has ended: it reads nothing."""
        if self._gpu is not None:
            self._gpu[1].remove_receiver(peer)
        self._asked.pop(peer, None)

    def close(self) -> None:
        """Free the thread; the memory is freed with the process."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _ready(self) -> "tuple[Device, DevicePublisher]":
        if self._gpu is None:
            from channels.weights.device import DevicePublisher

            device = self._make_device()
            self._gpu = (
                device,
                DevicePublisher(
                    device,
                    self._send_soon,
                    dtype=self._dtype,
                    rank=self._rank,
                    num_ranks=self._num_ranks,
                ),
            )
        return self._gpu

    async def _serve(self) -> None:
        """Rounds: all that asked while the one before was under way share the next."""
        try:
            while self._asked:
                asked, self._asked = self._asked, {}
                offered = self._offered
                names = []
                for name, version in asked.items():
                    # Who did not take a bucket in time may be reading it still: the pool is nobody's until it has.
                    if offered and version == offered[0] and not self._ready()[1].reading():
                        names.append(name)
                    else:
                        self._refuse(name, version)
                if names:
                    await self._round(names, offered)
        finally:
            self._serving = None

    async def _round(self, names: list[str], offered: Any) -> None:
        publisher = self._ready()[1]
        for name in names:
            publisher.add_receiver(name)
        try:
            await self._loop.run_in_executor(self._thread, self._publish, *offered)
        except ChannelError as error:
            log.warning("weights on the device: %s", error)
            for name in names:
                self._refuse(name, offered[0])
        for name in set(names) - set(publisher.reading()):
            publisher.remove_receiver(name)

    def _publish(
        self, version: VersionName, tensors: "Mapping[str, torch.Tensor]", updated: Any
    ) -> None:
        device, publisher = self._ready()
        with self._own_stream(device):
            updated.wait(device.stream())
            publisher.publish(*version, tensors.items(), timeout_s=TIMEOUT_S)

    def _own_stream(self, device: "Device") -> Any:
        """The thread's: behind what the trainer computes, buckets would come when its step is over."""
        if device.device.type != "cuda":
            return nullcontext()
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream(device.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def _refuse(self, name: str, asked: VersionName) -> None:
        self._send(name, DeviceWeightsRefused(run_attempt=asked[0], policy_version=asked[1]))

    def _send_soon(self, name: str, bucket: WeightsBucket) -> None:
        self._loop.call_soon_threadsafe(self._send, name, bucket)

    def _send(self, name: str, message: Message) -> None:
        try:
            self._endpoint.send(name, message)
        except ChannelError:
            self.peer_gone(name)
