"""Messages between processes of a node: Unix sockets served by the loop itself, with no thread in between.

ZeroMQ passes each message through a thread of its own on either side, three wake-ups where this has one; on a small
machine they cost more than all else that a call does.

A `LocalMailbox` listens at a path, a `LocalConnection` sends to one, one way. Contract:

* Order is kept and nothing is lost while both ends live. What the dead end had not read is lost, what was not yet given
  to the system goes to the next process that listens at the path, from the message that was cut on.
* `send` never blocks: what the system does not take waits, without a bound. Parts that wait are not copied.
* A connection whose sender's name is already known ends the older one.

On the wire a message is the number of its parts (4 bytes), their lengths (8 bytes each), little-endian, and the parts.
The first message of a connection is one part, the sender's name.
"""

import asyncio
import errno
import functools
import logging
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from channels.errors import TooLarge
from channels.sockets import Frame, Part

log = logging.getLogger(__name__)

JOINED_BYTES = 64 * 1024  # below it one copy and one buffer are cheaper than several buffers
READ_BYTES = 256 * 1024  # what a Unix socket of this system holds, by default
CALLS_PER_TURN = 16  # to the system, then the loop breathes
MAX_BUFFERS = 512  # of one sendmsg; the system allows 1024
MAX_PARTS = (
    1 << 14
)  # so that their lengths, and the beginning of a message, fit what is read at once
RECONNECT_S = 0.05
RECONNECT_MAX_S = 1.0
ACCEPT_AGAIN_S = 1.0

_COUNT = struct.Struct("<I")


class _Frame:
    """A part of a message that came."""

    __slots__ = ("buffer",)

    def __init__(self, part: Part) -> None:
        self.buffer = memoryview(part)

    @property
    def bytes(self) -> bytes:
        return self.buffer.tobytes()


@functools.lru_cache
def _head(count: int) -> struct.Struct:
    return struct.Struct(f"<I{count}Q")


def _message(parts: Sequence[Part]) -> list[Part]:
    """The buffers of a message on the wire: one, where they are small."""
    if len(parts) > MAX_PARTS:
        raise TooLarge(f"a message of {len(parts)} parts is over the limit of {MAX_PARTS}")
    lengths = [len(part) for part in parts]
    head = _head(len(parts)).pack(len(parts), *lengths)
    if sum(lengths) < JOINED_BYTES:
        return [b"".join([head, *parts])]
    return [head, *parts]


class LocalConnection:
    """A connection to whoever listens at a path, now or later: a `channels.sockets.Connection`."""

    def __init__(self, path: str, name: bytes) -> None:
        self._path = path
        self._hello = _message([name])[0]
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._waiting: deque[list[Part]] = deque()  # messages
        self._sent = 0  # bytes of the first of them
        self._writing = False  # the loop tells when the system takes more
        self._delay_s = RECONNECT_S
        self._retry: asyncio.TimerHandle | None = None
        self._connect()

    def send(self, parts: Sequence[Part]) -> None:
        message = _message(parts)
        if self._socket is None or self._waiting or len(message) > 1:
            self._waiting.append(message)
            if len(self._waiting) == 1:
                self._flush()
            return
        try:
            sent = self._socket.send(message[0])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._waiting.append(message)
            self._lost(error)
            return
        if sent < len(message[0]):
            self._waiting.append(message)
            self._sent = sent
            self._write_later()

    def close(self, linger_ms: int = 0) -> None:
        if self._retry is not None:
            self._retry.cancel()
        connected = self._detach()
        if connected is None:
            return
        if self._waiting and linger_ms:
            # Not a daemon: the end of the process waits for it.
            threading.Thread(
                target=_send_the_rest,
                args=(connected, self._waiting, self._sent, linger_ms / 1000),
                name="linger",
            ).start()
        else:
            connected.close()
        self._waiting = deque()

    def _connect(self) -> None:
        self._retry = None
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            connecting.connect(self._path)
            connecting.send(self._hello)
        except OSError as error:  # nobody listens yet, or too many connect at once
            connecting.close()
            self._try_later(error)
            return
        self._socket = connecting
        self._delay_s = RECONNECT_S
        self._loop.add_reader(connecting.fileno(), self._ended)
        self._flush()

    def _try_later(self, error: OSError) -> None:
        log.debug("not connected path=%s: %s", self._path, error)
        self._retry = self._loop.call_later(self._delay_s, self._connect)
        self._delay_s = min(2 * self._delay_s, RECONNECT_MAX_S)

    def _ended(self) -> None:
        """The other end never sends: that there is something to read is its end."""
        self._lost(ConnectionResetError(errno.ECONNRESET, "the other end is gone"))

    def _lost(self, error: OSError) -> None:
        gone = self._detach()
        if gone is not None:
            gone.close()
        self._sent = 0  # whoever listens next gets the message that was cut as a whole
        self._try_later(error)

    def _detach(self) -> socket.socket | None:
        detached, self._socket = self._socket, None
        if detached is not None:
            self._loop.remove_reader(detached.fileno())
            if self._writing:
                self._loop.remove_writer(detached.fileno())
                self._writing = False
        return detached

    def _write_later(self) -> None:
        if not self._writing and self._socket is not None:
            self._writing = True
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _flush(self) -> None:
        connected = self._socket
        if connected is None:
            return
        for _ in range(CALLS_PER_TURN):
            if not self._waiting:
                if self._writing:
                    self._loop.remove_writer(connected.fileno())
                    self._writing = False
                return
            try:
                self._sent = _send_some(connected, self._waiting, self._sent)
            except BlockingIOError:
                break
            except OSError as error:
                self._lost(error)
                return
        self._write_later()


def _send_some(connected: socket.socket, waiting: deque[list[Part]], sent: int) -> int:
    """Send what the system takes of the first message, from byte `sent` on.

    Returns how much of what is first then has been sent.
    """
    message = waiting[0]
    buffers: list[Part] = []
    skip, left = sent, 0
    for part in message:
        if skip >= len(part):
            skip -= len(part)
            continue
        buffers.append(memoryview(part)[skip:] if skip else part)
        left += len(part) - skip
        skip = 0
    done = connected.sendmsg(buffers[:MAX_BUFFERS])
    if done < left:
        return sent + done
    waiting.popleft()
    return 0


def _send_the_rest(
    connected: socket.socket, waiting: deque[list[Part]], sent: int, timeout_s: float
) -> None:
    until = time.monotonic() + timeout_s
    try:
        while waiting and (left_s := until - time.monotonic()) > 0:
            connected.settimeout(left_s)
            sent = _send_some(connected, waiting, sent)
    except OSError as error:
        log.debug("not sent before the end: %s", error)
    finally:
        connected.close()


class LocalMailbox:
    """Listens at a path, and takes over what an earlier process left there.

    on_frames: called by the loop with the frames of each message, of which the first is the sender's name; their memory
    is the receiver's own. What it raises goes to the loop's exception handler and does not stop the reading.
    """

    def __init__(
        self, path: str, on_frames: Callable[[Sequence[Frame]], None], max_message_bytes: int
    ) -> None:
        """Raises OSError when the path cannot be bound."""
        self.path = path
        self.max_message_bytes = max_message_bytes
        self._on_frames = on_frames
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._inlets: set[_Inlet] = set()
        self._named: dict[bytes, _Inlet] = {}
        self._again: asyncio.TimerHandle | None = None
        self._closed = False
        # One for all connections: between two turns of the loop nothing of it is in use.
        self.buffer = bytearray(READ_BYTES)
        self.view = memoryview(self.buffer)
        try:
            _bind(self._socket, path)
            self._socket.listen(socket.SOMAXCONN)
        except OSError:
            self._socket.close()
            raise
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def close(self) -> None:
        """Stop listening and reading, and remove the path."""
        if self._closed:
            return
        self._closed = True
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        for inlet in list(self._inlets):
            inlet.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    def _accept(self) -> None:
        try:
            accepted, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:  # out of file descriptors, as a rule: whoever waits stays in line
            log.error("cannot accept at %s: %s", self.path, error)
            self._loop.remove_reader(self._socket.fileno())
            self._again = self._loop.call_later(ACCEPT_AGAIN_S, self._accept_again)
            return
        accepted.setblocking(False)
        inlet = _Inlet(self, accepted)
        self._inlets.add(inlet)
        self._loop.add_reader(accepted.fileno(), inlet.read)

    def _accept_again(self) -> None:
        self._again = None
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def introduced(self, name: bytes, inlet: "_Inlet") -> None:
        """A connection has said whose it is."""
        older = self._named.get(name)
        self._named[name] = inlet
        if older is not None:
            older.close()

    def deliver(self, frames: list[Frame]) -> None:
        """A message is complete."""
        try:
            self._on_frames(frames)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": "a handler of received messages failed", "exception": error}
            )

    def left(self, inlet: "_Inlet", accepted: socket.socket) -> None:
        """A connection is over."""
        self._loop.remove_reader(accepted.fileno())
        accepted.close()
        self._inlets.discard(inlet)
        if inlet.name is not None and self._named.get(inlet.name) is inlet:
            del self._named[inlet.name]


class _Inlet:
    """One accepted connection: bytes in, messages out."""

    def __init__(self, mailbox: LocalMailbox, accepted: socket.socket) -> None:
        self.name: bytes | None = None
        self._sender: Frame
        self._mailbox = mailbox
        self._socket = accepted
        self._rest = b""  # the beginning of a message, shorter than JOINED_BYTES or than its head
        # A large message that is being read, straight into its parts, and how many bytes of the first unfinished one.
        self._parts: list[Part] = []
        self._unfinished: deque[memoryview] = deque()
        self._closed = False

    def close(self) -> None:
        """Read no more."""
        if not self._closed:
            self._closed = True
            self._mailbox.left(self, self._socket)

    def read(self) -> None:
        """The socket is readable."""
        try:
            if self._unfinished:
                self._read_large()
                return
            mailbox, rest = self._mailbox, self._rest
            have = len(rest)
            if have:
                mailbox.view[:have] = rest
            count = self._socket.recv_into(mailbox.view[have:] if have else mailbox.view)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self.close()
            return
        self._parse(have + count)

    def _parse(self, end: int) -> None:
        buffer = self._mailbox.buffer
        position = 0
        while end - position >= 4:
            (count,) = _COUNT.unpack_from(buffer, position)
            if not 0 < count <= MAX_PARTS:
                return self._refuse(f"a message of {count} parts")
            start = position + 4 + 8 * count
            if start > end:
                break
            lengths = _head(count).unpack_from(buffer, position)[1:]
            total = sum(lengths)
            if start + total > end:
                if total > self._mailbox.max_message_bytes:
                    return self._refuse(f"a message of {total} bytes")
                if total >= JOINED_BYTES:
                    self._rest = b""
                    return self._begin_large(lengths, start, end)
                break
            parts: list[Part] = []
            for length in lengths:
                parts.append(buffer[start : start + length])
                start += length
            position = start
            self._take(parts)
            if self._closed:
                return
        self._rest = bytes(buffer[position:end]) if position < end else b""

    def _begin_large(self, lengths: Sequence[int], start: int, end: int) -> None:
        # Not bytearrays: those would be filled with zeros first.
        self._parts = [np.empty(length, np.uint8).data for length in lengths]
        self._unfinished = deque(memoryview(part) for part in self._parts if len(part))
        while start < end:
            part = self._unfinished[0]
            count = min(len(part), end - start)
            part[:count] = self._mailbox.view[start : start + count]
            start += count
            self._advance(count)

    def _read_large(self) -> None:
        for _ in range(CALLS_PER_TURN):
            count = self._socket.recv_into(self._unfinished[0])
            if not count:
                self.close()
                return
            self._advance(count)
            if not self._unfinished:
                parts, self._parts = self._parts, []
                self._take(parts)
                return

    def _advance(self, count: int) -> None:
        part = self._unfinished[0]
        if count == len(part):
            self._unfinished.popleft()
        else:
            self._unfinished[0] = part[count:]

    def _take(self, parts: list[Part]) -> None:
        if self.name is None:
            self.name = bytes(parts[0])
            self._sender = _Frame(self.name)
            self._mailbox.introduced(self.name, self)
        else:
            self._mailbox.deliver([self._sender, *map(_Frame, parts)])

    def _refuse(self, what: str) -> None:
        log.warning("connection of %r at %s ended: %s", self.name, self._mailbox.path, what)
        self.close()


def _bind(listening: socket.socket, path: str) -> None:
    try:
        listening.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        os.unlink(path)
        listening.bind(path)
