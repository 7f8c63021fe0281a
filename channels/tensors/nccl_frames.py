"""Device tensors of one endpoint over NCCL: who can take them, what is on its way, what came.

Before the first frame goes to a peer, it is asked whether it can take tensors from this GPU; until it has said so, and
for good where it cannot, frames go there through the host.

A frame's place in a message is a `Transfer`, as for a frame that follows in chunks: the receiver holds the message, and
later ones of its channel, until the transfer is there. It posts the receive as soon as it reads the message, so links
keep their order, and memory is taken for what a message announced and credit admitted, and for nothing else.

Loss: none while both live. The sender keeps a frame until the receiver says that it has it; what a link lost with its
failure is sent through the host, under the same number. Then tensors take that way for RETRY_S, and NCCL is asked anew.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from channels.errors import BadFrame
from channels.messages import Message
from channels.tensors.device_messages import (
    LinkClosed,
    NcclAnswered,
    NcclOffered,
    NcclTaken,
)
from channels.tensors.devices import Device
from channels.tensors.errors import DeviceError
from channels.tensors.nccl import NcclLinks
from channels.tensors.returning import OnLoop
from channels.tensors.tcp import PLACE_BYTES, Transfer
from channels.tensors.tensor_frame import TensorFrame

log = logging.getLogger(__name__)

RETRY_S = 300.0


@dataclass(slots=True)
class _Peer:
    """answer: None while it is asked    ask_again: from then on, after a failure"""

    asked: bool = False
    answer: NcclAnswered | None = None
    ask_again: float = float("inf")
    held: dict[int, TensorFrame] = field(default_factory=dict)  # sent, and not said to be there
    arriving: dict[int, "Future[torch.Tensor]"] = field(default_factory=dict)


@dataclass(slots=True)
class _Taken:
    arrived: list[int] = field(default_factory=list)
    missed: list[int] = field(default_factory=list)
    reason: str = ""


class NcclFrames:
    """See the module docstring. On the loop.

    numbers: of transfers to any peer
    say: sends a message to a peer, which may be gone
    send_bytes: sends a transfer to a peer, which may be gone, through the host
    arrived: takes a transfer of a sender that is whole
    max_bytes: of one frame
    """

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        numbers: Iterator[int],
        say: Callable[[str, Message], None],
        send_bytes: Callable[[str, Transfer, memoryview], None],
        arrived: Callable[[str, int, Any], None],
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._device, self._clock = name, device, clock
        self._numbers, self._say, self._send_bytes = numbers, say, send_bytes
        self._arrived, self._max_bytes = arrived, max_bytes
        self._loop = asyncio.get_running_loop()
        self._links: NcclLinks | None = None
        self._useless = ""  # why this process has no NCCL
        self._peers: dict[str, _Peer] = {}
        self._news: deque[Callable[[], None]] = deque()  # of the links' threads
        self._on_loop = OnLoop(self._take_news)
        self._taken: dict[str, _Taken] = {}
        self._closed = False

    def send(self, peer: str, frame: TensorFrame) -> bytes | None:
        """Send a frame, and what stands in the message in place of it; None where it is to go through the host."""
        known = self._peers.setdefault(peer, _Peer())
        if not known.asked or self._clock() >= known.ask_again:
            known.asked, known.answer, known.ask_again = True, None, float("inf")
            self._ask(peer, known)
        if self._links is None or known.answer is None or not known.answer.reaches:
            return None
        try:
            place, _ = self._links.send(peer, frame.tensor, frame.ready)
        except DeviceError as error:
            self._failed(peer, known, str(error))
            return None
        transfer = Transfer(next(self._numbers), frame.nbytes)
        known.held[transfer.number] = frame
        return transfer.place() + place

    def receive(self, sender: str, place: memoryview) -> Transfer:
        """Begin to take what a message announces. Raises BadFrame."""
        transfer = Transfer.read(place[:PLACE_BYTES], self._max_bytes)
        if self._links is None:
            raise BadFrame("a tensor is said to come over NCCL, and nobody asked before")
        future = self._links.receive(sender, place[PLACE_BYTES:])
        self._peers.setdefault(sender, _Peer()).arriving[transfer.number] = future
        future.add_done_callback(partial(self._done, sender, transfer.number))
        return transfer

    def reaches(self, peer: str) -> NcclAnswered | None:
        """What a peer answered, or what failed since; None before."""
        known = self._peers.get(peer)
        return known.answer if known is not None else None

    def received(self, sender: str, message: Message) -> None:
        """Take what a peer said."""
        match message:
            case NcclOffered():
                self._say(sender, self._answer(sender, message))
            case NcclAnswered():
                known = self._peers.get(sender)
                if known is not None and known.asked and known.answer is None:
                    known.answer = message
                    if not message.reaches:
                        log.warning(
                            "device tensors for %s go through the host: %s", sender, message.reason
                        )
            case NcclTaken():
                self._settle(sender, message)
            case LinkClosed() if self._links is not None:
                self._links.closed(sender, message)

    def forget(self, peer: str) -> None:
        """A peer is gone, and with it what was on its way to it and from it."""
        self._peers.pop(peer, None)
        self._taken.pop(peer, None)
        if self._links is not None:
            self._links.peer_gone(peer)

    def close(self) -> None:
        """Send and take nothing more."""
        self._closed = True
        self._on_loop.close()
        if self._links is not None:
            self._links.close()

    def _ready(self) -> NcclLinks | None:
        if self._links is None and not self._useless and not self._closed:
            try:
                library = self._device.nccl()
            except DeviceError as error:
                self._useless = str(error)
                return None
            self._links = NcclLinks(self._name, library, self._post, max_bytes=self._max_bytes)
        return self._links

    def _ask(self, peer: str, known: _Peer) -> None:
        links = self._ready()
        if links is None:
            known.answer = NcclAnswered(reaches=False, reason=self._useless)
        else:
            self._say(peer, NcclOffered(uuid=self._device.uuid, version=links.library.version))

    def _answer(self, sender: str, offer: NcclOffered) -> NcclAnswered:
        links = self._ready()
        reason = ""
        if links is None:
            reason = self._useless or f"{self._name} is closed"
        elif offer.uuid == self._device.uuid:
            # NCCL would hang, or refuse in words that name neither end.
            reason = (
                f"{self._name} and {sender} are on the same GPU, {offer.uuid}, "
                "which NCCL cannot connect"
            )
        elif offer.version != links.library.version:
            reason = (
                f"{sender} has NCCL {_version(offer.version)} and {self._name} "
                f"{_version(links.library.version)}: install the same torch at both ends"
            )
        return NcclAnswered(reaches=not reason, reason=reason)

    def _settle(self, peer: str, message: NcclTaken) -> None:
        known = self._peers.get(peer)
        if known is None:
            return
        for number in message.arrived:
            known.held.pop(number, None)
        missed = [n for n in message.missed if n in known.held]
        if missed:
            self._failed(peer, known, message.reason)
        for number in missed:
            frame = known.held.pop(number)
            self._send_bytes(peer, Transfer(number, frame.nbytes), frame.view)

    def _failed(self, peer: str, known: _Peer, reason: str) -> None:
        log.warning("device tensors for %s go through the host for a while: %s", peer, reason)
        known.answer = NcclAnswered(reaches=False, reason=f"NCCL failed: {reason}")
        known.ask_again = self._clock() + RETRY_S

    # In any thread.

    def _post(self, peer: str, message: LinkClosed) -> None:
        self._news.append(partial(self._say, peer, message))
        self._on_loop.soon()

    def _done(self, sender: str, number: int, future: "Future[torch.Tensor]") -> None:
        self._news.append(partial(self._ended, sender, number, future))
        self._on_loop.soon()

    # On the loop again.

    def _take_news(self) -> None:
        while self._news:
            try:
                self._news.popleft()()
            except Exception as error:
                self._loop.call_exception_handler(
                    {"message": "a handler of received messages failed", "exception": error}
                )
        taken, self._taken = self._taken, {}
        for sender, of in taken.items():
            self._say(
                sender,
                NcclTaken(arrived=tuple(of.arrived), missed=tuple(of.missed), reason=of.reason),
            )

    def _ended(self, sender: str, number: int, future: "Future[torch.Tensor]") -> None:
        known = self._peers.get(sender)
        if known is None or known.arriving.get(number) is not future:
            return  # of a sender that was forgotten
        del known.arriving[number]
        taken = self._taken.setdefault(sender, _Taken())
        error = future.exception()
        if error is None:
            taken.arrived.append(number)
            self._arrived(sender, number, future.result())
        else:
            taken.missed.append(number)
            taken.reason = str(error)[:1000]


def _version(number: int) -> str:
    """As people write it; from 2.9 on, NCCL has two digits for each part."""
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
