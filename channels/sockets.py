"""A ZeroMQ socket drained on an asyncio loop: plain non-blocking calls, no await per frame.

ZeroMQ's file descriptor is edge-triggered: it becomes readable once, when the socket's state
changes, and any call on the socket may use up that edge. So readiness is always asked of EVENTS:
until it says no, and again after every send. One turn takes a bounded number of messages, then
lets the loop breathe. Works on uvloop and on the standard loop.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

MAX_PER_TURN = 128
COPY_BELOW_BYTES = (
    65536  # below it, pyzmq's bookkeeping of a shared buffer costs more than the copy
)

# Plain integers: an operation on pyzmq's enum flags costs more than the question it asks.
_READABLE = int(zmq.POLLIN)
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

Part = bytes | bytearray | memoryview


class Frame(Protocol):
    """A part of a message that came: a zmq.Frame, or what other sockets make of theirs."""

    @property
    def bytes(self) -> bytes: ...

    @property
    def buffer(self) -> memoryview: ...


class Connection(Protocol):
    """One way to a mailbox."""

    def send(self, parts: Sequence[Part]) -> None:
        """Send one message of at least one part. Never blocks."""
        ...

    def close(self, linger_ms: int = 0) -> None:
        """End the connection; what was sent has `linger_ms` to leave."""
        ...


class DrainedSocket:
    """Reads a socket on the running loop. Takes the socket over: `close` closes it.

    on_frames: called with the frames of each message, never from within `send`. What it raises goes
    to the loop's exception handler and does not stop the reading.
    per_turn: messages that are taken before the loop has its turn
    """

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        on_frames: Callable[[list[zmq.Frame]], None],
        *,
        per_turn: int = MAX_PER_TURN,
    ) -> None:
        self.socket = socket
        self._on_frames = on_frames
        self._per_turn = per_turn
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._again: asyncio.Handle | None = None
        self._closed = False
        self._loop.add_reader(self._fd, self._drain)
        self._drain_soon()  # what arrived before the reader was there makes no new edge

    def send(self, parts: Sequence[Part]) -> None:
        """Send one message. Never blocks; raises zmq.Again where the socket has a full high-water
        mark."""
        try:
            send_parts(self.socket, parts)
        finally:  # a send that fails may have used up the edge as well
            if int(self.socket.getsockopt(zmq.EVENTS)) & _READABLE:
                self._drain_soon()

    def close(self, linger_ms: int = 0) -> None:
        """Stop reading and close the socket; what was sent has `linger_ms` to leave."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        if self._again is not None:
            self._again.cancel()
        self.socket.close(linger_ms)

    def _drain_soon(self) -> None:
        if self._again is None and not self._closed:
            self._again = self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._again = None
        self._drain()

    def _drain(self) -> None:
        socket = self.socket
        for _ in range(self._per_turn):
            if self._closed or not int(socket.getsockopt(zmq.EVENTS)) & _READABLE:
                return
            frame = socket.recv(_LAST, copy=False)
            frames = [frame]
            while frame.more:
                frame = socket.recv(_LAST, copy=False)
                frames.append(frame)
            try:
                self._on_frames(frames)
            except Exception as error:
                self._loop.call_exception_handler(
                    {"message": "a handler of received messages failed", "exception": error}
                )
        self._drain_soon()


def send_parts(socket: "zmq.Socket[bytes]", parts: Sequence[Part]) -> None:
    """Send one multipart message, not blocking; large parts are shared with ZeroMQ, not copied."""
    last = len(parts) - 1
    for position, part in enumerate(parts):
        flags = _LAST if position == last else _MORE
        socket.send(part, flags, copy=len(part) < COPY_BELOW_BYTES)
