"""Device tensors of one endpoint and its peers: who can reach whose GPU, what is lent, what is given back.

Before the first frame goes to a peer, its pool is offered; until the peer has said that it can reach it, and for good
where it cannot, frames go there as host bytes. So a message never names memory that its receiver cannot open.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from channels.errors import BadFrame
from channels.messages import Message
from channels.tensors.errors import DeviceError, DeviceUnreachable
from channels.tensors.returning import OnLoop

if TYPE_CHECKING:
    import torch

    from channels.tensors.cuda_ipc import DeviceArena, DeviceFrame, DeviceViews
    from channels.tensors.devices import Device

log = logging.getLogger(__name__)

LENT_FROM_BYTES = (
    64 * 1024
)  # smaller tensors are copied to the host: a block and its event cost more


class DeviceMessage(Message, frozen=True):
    """Between two endpoints that lend each other device memory."""


class DeviceOffered(DeviceMessage, frozen=True, tag="device_offered"):
    """Sender to receiver: tensors would come in this memory; can you reach it?"""

    offer: bytes


class DeviceAnswered(DeviceMessage, frozen=True, tag="device_answered"):
    """Receiver to sender: yes, or why not."""

    reaches: bool
    reason: str = ""


class DeviceReturned(DeviceMessage, frozen=True, tag="device_returned"):
    """Receiver to sender: these blocks of your pool are no longer looked at here."""

    blocks: tuple[int, ...]


class DeviceLending:
    """See the module docstring. On the loop, but for what collected tensors set off.

    make: gives the GPU of this process; called when the first device tensor is sent or offered
    device_type: of the tensors that are lent, as torch names it
    send: a message to a peer, which may be gone
    """

    def __init__(
        self,
        make: "Callable[[], Device]",
        send: Callable[[str, Message], None],
        *,
        device_type: str = "cuda",
    ) -> None:
        self._make = make
        self._send = send
        self._device_type = device_type
        self._arena: DeviceArena | None = None
        self._views: DeviceViews | None = None
        self._useless = ""  # why this process lends and opens nothing
        self._answers: dict[str, DeviceAnswered | None] = {}  # None: asked and not answered yet
        self._returning = OnLoop(self._return_released)
        self._closed = False

    def frame(self, tensor: "torch.Tensor") -> "DeviceFrame | None":
        """A frame for a device tensor, in the pool; None for one that is to go through the host."""
        if tensor.device.type != self._device_type or tensor.nbytes < LENT_FROM_BYTES:
            return None
        return self._arena.copy_in(tensor) if self._ready() and self._arena else None

    def empty(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor | None":
        """A tensor in the pool, to be filled and sent without a copy; None when there is no room or no GPU."""
        return self._arena.empty(shape, dtype) if self._ready() and self._arena else None

    def lend(self, peer: str, frame: Any) -> bytes | None:
        """What a peer of this node is sent in place of a DeviceFrame; None where it is to get the bytes."""
        if peer not in self._answers:
            self._answers[peer] = None
            try:
                assert self._arena is not None
                self._send(peer, DeviceOffered(offer=self._arena.offer()))
            except DeviceError as error:
                self._answers[peer] = DeviceAnswered(reaches=False, reason=str(error))
        answer = self._answers[peer]
        if answer is None or not answer.reaches:
            return None
        place: bytes = frame.lend(peer)
        return place

    def reaches(self, peer: str) -> DeviceAnswered | None:
        """What a peer answered; None before it did."""
        return self._answers.get(peer)

    def open(self, sender: str, place: memoryview) -> "torch.Tensor":
        """The bytes that a sender lent, as a tensor of this GPU. Raises BadFrame."""
        if self._views is None:
            raise BadFrame("device memory was lent, and none was offered before")
        try:
            return self._views.open(sender, bytes(place))
        except DeviceUnreachable as error:
            raise BadFrame(str(error)) from error

    def received(self, sender: str, message: DeviceMessage) -> None:
        """Take what a peer said. Raises BadFrame for an offer that is none."""
        match message:
            case DeviceOffered():
                self._send(sender, self._answer(sender, message.offer))
            case DeviceAnswered():
                if self._answers.get(sender, message) is None:
                    self._answers[sender] = message
                    if not message.reaches:
                        log.warning(
                            "device tensors for %s go through the host: %s", sender, message.reason
                        )
            case DeviceReturned():
                if self._arena is not None:
                    self._arena.returned(sender, message.blocks)

    def forget(self, peer: str) -> None:
        """A peer is gone: it holds nothing, and what it lent is unmapped when nobody looks at it."""
        self._answers.pop(peer, None)
        if self._arena is not None:
            self._arena.peer_gone(peer)
        if self._views is not None:
            self._views.forget(peer)

    def close(self) -> None:
        """Lend and open nothing more."""
        self._closed = True
        self._returning.close()
        if self._arena is not None:
            self._arena.close()
        if self._views is not None:
            self._views.close()

    def _ready(self) -> bool:
        if self._arena is None and not self._useless and not self._closed:
            try:
                from channels.tensors.cuda_ipc import DeviceArena, DeviceViews

                device = self._make()
            except (ImportError, DeviceError) as error:
                self._useless = str(error)
                log.warning("device tensors go through the host: %s", error)
                return False
            self._arena, self._views = (
                DeviceArena(device),
                DeviceViews(device, self._returning.soon),
            )
        return self._arena is not None and not self._closed

    def _answer(self, sender: str, offer: bytes) -> DeviceAnswered:
        if not self._ready() or self._views is None:
            return DeviceAnswered(reaches=False, reason=self._useless or "it is closed")
        try:
            self._views.accept(sender, offer)
        except DeviceUnreachable as error:
            return DeviceAnswered(reaches=False, reason=str(error))
        return DeviceAnswered(reaches=True)

    def _return_released(self) -> None:
        if self._views is not None:
            for sender, blocks in self._views.take_released().items():
                self._send(sender, DeviceReturned(blocks=tuple(blocks)))
