"""A rollout actor's side of weights that come from the trainer's GPUs: asked for at a boundary, written in place.

From the first bucket on the tensors are no version at all, until the last one is there: it all happens between two
forward passes. If anything goes wrong the caller loads the host copy.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from channels.endpoint import Endpoint
from channels.errors import ChannelError
from channels.messages import Message
from channels.tensors.errors import DeviceError
from channels.weights.device_messages import (
    DeviceWeightsAsked,
    DeviceWeightsRefused,
    WeightsBucket,
)
from channels.weights.versions import VersionName

if TYPE_CHECKING:
    import torch

    from channels.tensors.devices import Device
    from channels.weights.device import DeviceReceiver

TIMEOUT_S = 30.0  # for the next bucket

log = logging.getLogger(__name__)
InWorker = Callable[..., Awaitable[Any]]  # runs a function with arguments in the worker thread


class DeviceWeights:
    """See the module docstring. make_device: gives the GPU, when it is first needed

    useless: why weights can not come this way, for good; empty while they may
    """

    def __init__(self, endpoint: Endpoint, make_device: "Callable[[], Device]") -> None:
        self._endpoint = endpoint
        self._make_device = make_device
        self._device: Device | None = None
        self._receiver: DeviceReceiver | None = None
        self._addresses: list[int] = []  # of the tensors that the receiver writes
        self._said: asyncio.Queue[tuple[str, Message | None]] = asyncio.Queue()
        self._loading: VersionName | None = None
        self.useless = ""

    def received(self, sender: str, message: Message) -> None:
        """Take what a rank of the trainer said."""
        if isinstance(message, WeightsBucket | DeviceWeightsRefused):
            if (message.run_attempt, message.policy_version) == self._loading:
                self._said.put_nowait((sender, message))
            else:
                self._taken(sender, message)  # of a load that was given up: nobody reads it

    def peer_gone(self, peer: str) -> None:
        """A rank died; its memory is mapped anew when another one is there."""
        self._addresses = []
        self._said.put_nowait((peer, None))

    async def load(
        self,
        version: VersionName,
        ranks: Sequence[str],
        tensors: "Mapping[str, torch.Tensor]",
        in_worker: InWorker,
    ) -> bool:
        """Write a version into the tensors. Returns whether it is there; else they hold nothing of use."""
        self._loading, self._said = version, asyncio.Queue()
        try:
            receiver = await in_worker(self._receiver_for, tensors)
            asked = DeviceWeightsAsked(run_attempt=version[0], policy_version=version[1])
            for rank in ranks:
                self._endpoint.send(rank, asked)
            return await self._take_all(receiver, ranks, in_worker)
        except (ChannelError, ValueError, TimeoutError) as error:
            # No GPU in reach, or tensors that cannot be written so: next time would be no different.
            if isinstance(error, DeviceError) or not isinstance(error, ChannelError | TimeoutError):
                self.useless = str(error)
            log.warning("weights come by way of the host: %r", error)
            return False
        finally:
            self._loading = None
            while not self._said.empty():
                sender, message = self._said.get_nowait()
                self._taken(sender, message)

    async def _take_all(
        self, receiver: "DeviceReceiver", ranks: Sequence[str], in_worker: InWorker
    ) -> bool:
        while True:
            async with asyncio.timeout(TIMEOUT_S):
                sender, message = await self._said.get()
            if message is None or isinstance(message, DeviceWeightsRefused):
                if sender in ranks:
                    log.info("weights are no longer on %s", sender)
                    return False
            elif isinstance(message, WeightsBucket):
                try:
                    complete = await in_worker(receiver.take, message)
                finally:
                    self._taken(sender, message)
                if complete:
                    return True

    def _receiver_for(self, tensors: "Mapping[str, torch.Tensor]") -> "DeviceReceiver":
        """The receiver that writes these; one for as long as they stay where they are."""
        from channels.weights.device import DeviceReceiver

        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        if self._receiver is None or addresses != self._addresses:
            if self._receiver is not None:
                self._receiver.close()
            if self._device is None:
                self._device = self._make_device()
            self._receiver = DeviceReceiver(self._device, tensors)
            self._addresses = addresses
        return self._receiver

    def _taken(self, sender: str, message: Message | None) -> None:
        """Acknowledge a bucket, whatever came of it."""
        if isinstance(message, WeightsBucket):
            try:
                self._endpoint.send(sender, message.taken())
            except ChannelError:
                pass  # its process has ended
