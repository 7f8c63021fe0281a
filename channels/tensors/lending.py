"""Device tensors of one endpoint by CUDA IPC: who can reach the GPU, what is lent, what is given back.

Before the first frame goes to a peer, its pool is offered; until the peer has said that it can reach it, and for good
where it cannot, frames go there another way. So a message never names memory that its receiver cannot open.
"""

import logging
from collections.abc import Callable

import torch

from channels.errors import BadFrame
from channels.messages import Message
from channels.tensors.cuda_ipc import DeviceArena, DeviceViews
from channels.tensors.device_messages import DeviceAnswered, DeviceOffered, DeviceReturned
from channels.tensors.devices import Device
from channels.tensors.errors import DeviceError, DeviceUnreachable
from channels.tensors.returning import OnLoop
from channels.tensors.tensor_frame import TensorFrame

log = logging.getLogger(__name__)


class DeviceLending:
    """See the module docstring. On the loop, but for what collected tensors set off.

    say: sends a message to a peer, which may be gone
    """

    def __init__(self, device: Device, say: Callable[[str, Message], None]) -> None:
        self._device = device
        self._say = say
        self._returning = OnLoop(self._return_released)
        self._arena = DeviceArena(device)
        self._views = DeviceViews(device, self._returning.soon)
        self._answers: dict[str, DeviceAnswered | None] = {}  # None: asked and not answered yet

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool that are in use."""
        return self._arena.num_blocks

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor in the pool, to be filled and sent without a copy; None when there is no room."""
        return self._arena.empty(shape, dtype)

    def lend(self, peer: str, frame: TensorFrame) -> bytes | None:
        """What a peer of this node is sent in place of a frame; None where it is to come another way."""
        if peer not in self._answers:
            self._answers[peer] = None
            try:
                self._say(peer, DeviceOffered(offer=self._arena.offer()))
            except DeviceError as error:
                self._answers[peer] = DeviceAnswered(reaches=False, reason=str(error))
        answer = self._answers[peer]
        if answer is None or not answer.reaches:
            return None
        if frame.lent is None:
            frame.ready.wait(self._device.stream())
            frame.lent = self._arena.copy_in(frame.tensor)
        return None if frame.lent is None else frame.lent.lend(peer)

    def reaches(self, peer: str) -> DeviceAnswered | None:
        """What a peer answered; None before it did."""
        return self._answers.get(peer)

    def open(self, sender: str, place: memoryview) -> torch.Tensor:
        """The bytes that a sender lent, as a tensor of this GPU. Raises BadFrame."""
        try:
            return self._views.open(sender, bytes(place))
        except DeviceUnreachable as error:
            raise BadFrame(str(error)) from error

    def received(
        self, sender: str, message: DeviceOffered | DeviceAnswered | DeviceReturned
    ) -> None:
        """Take what a peer said. Raises BadFrame for an offer that is none."""
        match message:
            case DeviceOffered():
                self._say(sender, self._answer(sender, message.offer))
            case DeviceAnswered():
                if sender in self._answers and self._answers[sender] is None:
                    self._answers[sender] = message
                    if not message.reaches:
                        log.warning("CUDA IPC does not reach %s: %s", sender, message.reason)
            case DeviceReturned():
                self._arena.returned(sender, message.blocks)

    def forget(self, peer: str) -> None:
        """A peer is gone: it holds nothing, and what it lent is unmapped when nobody looks at it."""
        self._answers.pop(peer, None)
        self._arena.peer_gone(peer)
        self._views.forget(peer)

    def close(self) -> None:
        """Lend and open nothing more."""
        self._returning.close()
        self._arena.close()
        self._views.close()

    def _answer(self, sender: str, offer: bytes) -> DeviceAnswered:
        try:
            self._views.accept(sender, offer)
        except DeviceUnreachable as error:
            return DeviceAnswered(reaches=False, reason=str(error))
        return DeviceAnswered(reaches=True)

    def _return_released(self) -> None:
        for sender, blocks in self._views.take_released().items():
            self._say(sender, DeviceReturned(blocks=tuple(blocks)))
