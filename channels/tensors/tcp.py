"""Large frames over TCP: a connection of their own, in chunks.

A gigabyte in one ZeroMQ message keeps whatever is sent after it waiting until its last byte has left. So a frame of
more than CHUNK_BYTES leaves its place in the message to a `Transfer` and follows in chunks on a second connection to
the same mailbox, a few in flight at a time; messages on the first connection pass it by.

Where the owner of the cluster wants bulk in the clear, chunks carry a tag, see `channels.tensors.tags`.

The receiver holds a message until the frames it names are whole, and with it the later ones of the same channel: order
is kept within each channel, and among messages of no channel.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import zmq

from channels.errors import BadFrame

if TYPE_CHECKING:
    from channels.tensors.tags import Tagger

CHUNK_BYTES = 1 << 20
IN_FLIGHT = 16  # chunks that wait in the socket; the kernel's buffers come on top
MAX_OPEN = 1024  # transfers of one sender at a time
IDENTITY_SUFFIX = b"\x1fbulk"  # of the second connection; no name ends so
CONNECTION_BYTES = 16  # of its number, which follows where chunks have tags

_PLACE = struct.Struct("<QQ")  # transfer, bytes
PLACE_BYTES = _PLACE.size
_CHUNK = struct.Struct("<QQQ")  # transfer, bytes of the whole, offset
_WRITABLE = int(zmq.POLLOUT)
_LAST = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


class Transfer(NamedTuple):
    """A frame that follows in chunks. number: unique among those of its sender."""

    number: int
    nbytes: int

    def place(self) -> bytes:
        """What stands in the message in place of the frame."""
        return _PLACE.pack(self.number, self.nbytes)

    @classmethod
    def read(cls, place: bytes | memoryview, limit: int) -> "Transfer":
        """What `place` gave. Raises BadFrame, also for more than `limit` bytes."""
        try:
            transfer = cls(*_PLACE.unpack(place))
        except struct.error as error:
            raise BadFrame(f"not the place of a transfer: {error}") from error
        if not 0 < transfer.nbytes <= limit:
            raise BadFrame(f"a transfer of {transfer.nbytes} bytes, where 1 to {limit} may come")
        return transfer


class BulkSender:
    """The second connection to one peer. Sends as fast as the peer takes, never blocking. Owns the socket.

    tagger: makes the tags of chunks that are not enciphered
    """

    def __init__(self, socket: "zmq.Socket[bytes]", tagger: "Tagger | None" = None) -> None:
        self._socket = socket
        self._tagger = tagger
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._queue: deque[tuple[Transfer, memoryview, int]] = deque()  # with the next offset
        self._closed = False
        self._scheduled = False
        self._loop.add_reader(self._fd, self._pump)

    def add(self, transfer: Transfer, data: memoryview) -> None:
        """Send a frame after those that wait. data: not to be changed until it has arrived."""
        self._queue.append((transfer, data.cast("B"), 0))
        self._soon()

    def close(self, linger_ms: int = 0) -> None:
        """Forget what was not sent."""
        if not self._closed:
            self._closed = True
            self._queue.clear()
            self._loop.remove_reader(self._fd)
            self._socket.close(linger_ms)

    def _soon(self) -> None:
        if not self._scheduled and not self._closed:
            self._scheduled = True
            self._loop.call_soon(self._pump_again)

    def _pump_again(self) -> None:
        self._scheduled = False
        self._pump()

    def _pump(self) -> None:
        # EVENTS is asked at least once per edge of the descriptor, else there would be no next one.
        for _ in range(IN_FLIGHT):
            if self._closed or not int(self._socket.getsockopt(zmq.EVENTS)) & _WRITABLE:
                return
            if not self._queue:
                return
            transfer, data, offset = self._queue.popleft()
            end = min(offset + CHUNK_BYTES, transfer.nbytes)
            if end < transfer.nbytes:
                self._queue.appendleft((transfer, data, end))
            head, chunk = _CHUNK.pack(*transfer, offset), data[offset:end]
            self._socket.send(head, _MORE)
            if self._tagger is not None:
                self._socket.send(self._tagger.mark(head, chunk), _MORE)
            self._socket.send(chunk, _LAST, copy=False)
        self._soon()  # other callbacks have their turn between


class _Arriving:
    """A frame of which chunks have come."""

    __slots__ = ("buffer", "have")

    def __init__(self, nbytes: int) -> None:
        self.buffer = np.empty(nbytes, np.uint8)
        self.have = 0


class _Waiting(NamedTuple):
    """A message whose frames are not all here."""

    missing: set[int]
    deliver: Callable[[], None]


class BulkReceiver:
    """Puts chunks together, and holds messages until their frames are whole.

    limit: bytes of one frame
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._arriving: dict[str, dict[int, _Arriving]] = {}
        self._whole: dict[str, dict[int, Any]] = {}
        self._held: dict[str, dict[str | None, deque[_Waiting]]] = {}

    def chunk(self, sender: str, head: bytes, data: memoryview) -> None:
        """Take a chunk; delivers what was waiting for it. Raises BadFrame for one that does not fit."""
        try:
            number, nbytes, offset = _CHUNK.unpack(head)
        except struct.error as error:
            raise BadFrame(f"not the head of a chunk: {error}") from error
        open_ones = self._arriving.setdefault(sender, {})
        frame = open_ones.get(number)
        if frame is None:
            if not 0 < nbytes <= self._limit or len(open_ones) >= MAX_OPEN:
                raise BadFrame(
                    f"a transfer of {nbytes} bytes beside {len(open_ones)} others; "
                    f"{self._limit} bytes and {MAX_OPEN} transfers are allowed"
                )
            frame = open_ones[number] = _Arriving(nbytes)
        end = offset + len(data)
        if offset != frame.have or end > len(frame.buffer) or nbytes != len(frame.buffer):
            del open_ones[number]
            raise BadFrame(
                f"a chunk at {offset} of {len(data)} bytes, where {frame.have} of "
                f"{len(frame.buffer)} had come"
            )
        frame.buffer[offset:end] = np.frombuffer(data, np.uint8)
        frame.have = end
        if end == nbytes:
            del open_ones[number]
            self.arrived(sender, number, frame.buffer.data)

    def arrived(self, sender: str, number: int, data: Any) -> None:
        """Take a transfer that came whole, also another way than in chunks; delivers what was waiting for it.

        data: something of `nbytes` elements
        """
        self._whole.setdefault(sender, {})[number] = data
        self._deliver(sender)

    def holds(self, sender: str) -> bool:
        """Whether any message of this sender is or was held: `hold` has to be asked."""
        return sender in self._held

    def hold(
        self,
        sender: str,
        lane: str | None,
        transfers: Iterable[Transfer],
        deliver: Callable[[], None],
    ) -> bool:
        """Keep a message until its transfers are whole and those before it in its lane are delivered.

        Returns False where there is nothing to wait for: the caller delivers it.
        """
        whole = self._whole.get(sender, {})
        missing = {t.number for t in transfers if t.number not in whole}
        lanes = self._held.setdefault(sender, {})
        if not missing and not lanes.get(lane):
            return False
        lanes.setdefault(lane, deque()).append(_Waiting(missing, deliver))
        return True

    def take(self, sender: str, transfer: Transfer) -> Any:
        """The data of a transfer that is whole, once. Raises BadFrame where they are not what was announced."""
        buffer = self._whole.get(sender, {}).pop(transfer.number, None)
        if buffer is None or len(buffer) != transfer.nbytes:
            came = "none" if buffer is None else len(buffer)
            raise BadFrame(f"{transfer.nbytes} bytes were announced and {came} came")
        return buffer

    def forget(self, sender: str) -> None:
        """A sender is gone: what it did not finish is dropped, and what waits for it."""
        self._arriving.pop(sender, None)
        self._whole.pop(sender, None)
        self._held.pop(sender, None)

    def _deliver(self, sender: str) -> None:
        whole = self._whole[sender]
        for waiting in list(self._held.get(sender, {}).values()):
            # Delivering may have the sender forgotten.
            while waiting and sender in self._held and waiting[0].missing <= whole.keys():
                waiting.popleft().deliver()
