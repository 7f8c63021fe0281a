"""Device tensors of one endpoint: by which way they go to each peer, and what comes from peers.

On a node by CUDA IPC (`lending`), else over NCCL (`nccl_frames`), else through the host. Nothing of CUDA is loaded, and
no GPU touched, before the first device tensor is sent or offered.
"""

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from channels.errors import BadFrame
from channels.messages import Message
from channels.tensors.device_messages import (
    DeviceAnswered,
    DeviceMessage,
    DeviceOffered,
    DeviceReturned,
    NcclAnswered,
    NcclOffered,
)
from channels.tensors.errors import DeviceError
from channels.tensors.tcp import BulkReceiver, Transfer

if TYPE_CHECKING:
    import torch

    from channels.tensors.devices import Device
    from channels.tensors.lending import DeviceLending
    from channels.tensors.nccl_frames import NcclFrames
    from channels.tensors.tensor_frame import TensorFrame

log = logging.getLogger(__name__)

# Smaller tensors are copied to the host: a block and its event, or a transfer, cost more.
ON_DEVICE_FROM_BYTES = 64 * 1024


CLOSED = "device tensors through the host: NCCL would send them in the clear"


class Way(NamedTuple):
    """How device tensors reach a peer: "cuda_ipc", "nccl", or "" where they go through the host; and why so."""

    transport: str
    why: str


class DeviceFrames:
    """See the module docstring. On the loop, but for what collected tensors set off.

    make: gives the GPU of this process, None where it has none
    device_type: of the tensors that stay on their device, as torch names it
    For `numbers`, `say` and `send_bytes` see `NcclFrames`. incoming: takes what came over NCCL
    far: NCCL may be used to other nodes, where it enciphers nothing
    """

    def __init__(
        self,
        name: str,
        make: "Callable[[], Device] | None",
        *,
        device_type: str,
        numbers: Iterator[int],
        say: Callable[[str, Message], None],
        send_bytes: Callable[[str, Transfer, memoryview], None],
        incoming: BulkReceiver,
        max_bytes: int,
        far: bool = True,
    ) -> None:
        self._far = far
        self._name, self._make, self._device_type = name, make, device_type
        self._numbers, self._say, self._send_bytes = numbers, say, send_bytes
        self._incoming, self._max_bytes = incoming, max_bytes
        self._useless = "" if make else f"{name} has no GPU"
        self._device: Device | None = None
        self._lending: DeviceLending | None = None
        self._nccl: NcclFrames | None = None
        self._closed = False

    def frame(self, tensor: "torch.Tensor") -> "TensorFrame | None":
        """The frame of a tensor on this process's GPU; None for one that is to go through the host."""
        if (
            tensor.device.type != self._device_type
            or tensor.nbytes < ON_DEVICE_FROM_BYTES
            or not self._ready()
        ):
            return None
        from channels.tensors.tensor_frame import TensorFrame

        assert self._device is not None
        return TensorFrame(self._device, tensor) if tensor.device == self._device.device else None

    def empty(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor | None":
        """A tensor that peers of this node reach, to be filled; None when there is no room or no GPU."""
        return self._lending.empty(shape, dtype) if self._ready() and self._lending else None

    def lend(self, peer: str, frame: Any) -> bytes | None:
        """What a peer of this node is sent in place of a frame, by CUDA IPC."""
        return None if self._lending is None else self._lending.lend(peer, frame)

    def send(self, peer: str, frame: Any, *, near: bool) -> bytes | None:
        """What a peer is sent in place of a frame that goes over NCCL. near: it is on this node."""
        if self._nccl is None or self._lending is None or not (near or self._far):
            return None
        if near:
            answer = self._lending.reaches(peer)
            if answer is None or answer.reaches:
                return None  # it answers soon; or it does reach the pool, which has no room
        return self._nccl.send(peer, frame)

    def open(self, sender: str, place: memoryview) -> "torch.Tensor":
        """The bytes that a sender lent, as a tensor of this GPU. Raises BadFrame."""
        if self._lending is None:
            raise BadFrame("device memory was lent, and none was offered before")
        return self._lending.open(sender, place)

    def receive(self, sender: str, place: memoryview) -> Transfer:
        """Begin to take what comes over NCCL. Raises BadFrame."""
        if self._nccl is None:
            raise BadFrame("a tensor is said to come over NCCL, and nobody asked before")
        return self._nccl.receive(sender, place)

    def way(self, peer: str, *, near: bool) -> Way | None:
        """How device tensors reach a peer; None before it was asked, and has answered."""
        if not (near or self._far):
            return Way("", CLOSED) if self._device is not None else None
        lent = self._lending.reaches(peer) if self._lending is not None and near else None
        if lent is not None and lent.reaches:
            return Way("cuda_ipc", "device tensors stay on the device")
        sent = None if self._nccl is None else self._nccl.reaches(peer)
        ipc = "" if lent is None else f"CUDA IPC does not: {lent.reason}"
        if sent is None:
            return Way("", f"device tensors through the host: {ipc}") if ipc else None
        if sent.reaches:
            return Way("nccl", "; ".join(filter(None, ("NCCL reaches its GPU", ipc))))
        reasons = dict.fromkeys((lent.reason, sent.reason) if lent else (sent.reason,))
        return Way("", f"device tensors through the host: {'; '.join(reasons)}")

    def received(self, sender: str, message: DeviceMessage) -> None:
        """Take what a peer said. Raises BadFrame for an offer that is none."""
        if isinstance(message, DeviceOffered | NcclOffered) and not self._ready():
            reason = self._useless or f"{self._name} is closed"
            answer = DeviceAnswered if isinstance(message, DeviceOffered) else NcclAnswered
            self._say(sender, answer(reaches=False, reason=reason))
        elif isinstance(message, DeviceOffered | DeviceAnswered | DeviceReturned):
            if self._lending is not None:
                self._lending.received(sender, message)
        elif self._nccl is not None:
            self._nccl.received(sender, message)

    def forget(self, peer: str) -> None:
        """A peer is gone."""
        if self._lending is not None and self._nccl is not None:
            self._lending.forget(peer)
            self._nccl.forget(peer)

    def close(self) -> None:
        """Send and take nothing more."""
        self._closed = True
        if self._lending is not None and self._nccl is not None:
            self._lending.close()
            self._nccl.close()

    def _ready(self) -> bool:
        if self._make is not None and not self._device and not self._useless and not self._closed:
            try:
                from channels.tensors.lending import DeviceLending
                from channels.tensors.nccl_frames import NcclFrames

                device = self._make()
            except (ImportError, DeviceError) as error:
                self._useless = str(error)
                log.warning("device tensors go through the host: %s", error)
                return False
            self._device = device
            self._lending = DeviceLending(device, self._say)
            self._nccl = NcclFrames(
                self._name,
                device,
                numbers=self._numbers,
                say=self._say,
                send_bytes=self._send_bytes,
                arrived=self._incoming.arrived,
                max_bytes=self._max_bytes,
            )
        return self._device is not None and not self._closed
