"""Messages between flowd and its zygote, and their frames. Neither sockets nor processes.

A frame is a 4-byte big-endian length and that many bytes of MessagePack. flowd sends requests, the
zygote replies and tells of events; both ends keep the order of what they send. `Spawn` and `List`
are answered, `Signal` and `Stop` are not: what they cause comes back as `Exited`.
"""

from collections.abc import Iterator

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 1024 * 1024
TAG_VARIABLE = "FLOWD_ZYGOTE"  # in the environment of a zygote and of all that descends from it
TORCH_THREADS_VARIABLE = "FLOWD_TORCH_THREADS"


class Message(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    """Base of everything in a frame; unknown fields are ignored, so that fields can be added."""


class Spawn(Message, frozen=True, tag="spawn"):
    """Start an actor. Repeated with the same `spawn_id`, it is answered but not run again."""

    spawn_id: str
    name: str
    entry: str
    """`module:function`, called with the argument; what it returns is the exit code (None: 0)."""
    argument: bytes
    argument_is_json: bool
    """The entry gets the decoded object rather than the bytes."""
    environment: dict[str, str | None]
    """What to change in the environment; None removes."""
    log_path: str
    """stdout and stderr are appended to it; its folder is made."""
    python: str | None = None
    """Another interpreter to run the entry in; None forks the zygote's own."""
    cwd: str | None = None
    nice: int = 0


class Signal(Message, frozen=True, tag="signal"):
    """Send a signal to an actor's whole process group; nothing happens when the actor is gone."""

    pid: int
    signum: int


class List(Message, frozen=True, tag="list"):
    """Ask for the live actors."""


class Stop(Message, frozen=True, tag="stop"):
    """SIGTERM to all actors, SIGKILL to what is left after `deadline_s`, then the zygote exits."""

    deadline_s: float


class ActorProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A live actor; `start_time` (clock ticks since boot) tells it from a later owner of its pid."""

    spawn_id: str
    name: str
    pid: int
    start_time: int


class Spawned(Message, frozen=True, tag="spawned"):
    """The actor runs (or ran: then its `Exited` follows)."""

    spawn_id: str
    pid: int
    start_time: int


class SpawnFailed(Message, frozen=True, tag="spawn_failed"):
    """No process was started; `reason` says what to change."""

    spawn_id: str
    reason: str


class Listing(Message, frozen=True, tag="listing"):
    """Answer to `List`."""

    actors: list[ActorProcess]


class Exited(Message, frozen=True, tag="exited"):
    """An actor ended: with an exit code, or by a signal. All of its process group is killed."""

    spawn_id: str
    name: str
    pid: int
    start_time: int
    exit_code: int | None
    signum: int | None


class Hello(Message, frozen=True, tag="hello"):
    """First message on a connection, sent once the zygote can fork."""

    protocol_version: int
    pid: int
    start_time: int
    actors: list[ActorProcess]
    exited: list[Exited]
    """The newest exits that the previous flowd may have missed."""
    warnings: list[str]


class Refused(Message, frozen=True, tag="refused"):
    """Instead of `Hello`: this connection is not taken; it is closed next."""

    reason: str


Request = Spawn | Signal | List | Stop
Reply = Hello | Refused | Spawned | SpawnFailed | Listing | Exited

_encoder = msgspec.msgpack.Encoder()
request_decoder = msgspec.msgpack.Decoder(Request)
reply_decoder = msgspec.msgpack.Decoder(Reply)


def encode_frame(message: Message) -> bytes:
    """One message as bytes for the socket. Raises ValueError above MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(
            f"a {type(message).__name__} message has {len(body)} bytes, the limit is "
            f"{MAX_FRAME_BYTES}: hand large data to an actor through a file or a channel"
        )
    return len(body).to_bytes(4, "big") + body


class FrameReader:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, received: bytes) -> Iterator[bytes]:
        """Take bytes, yield the bodies they complete. ValueError for a frame over the limit."""
        self._buffer += received
        while len(self._buffer) >= 4:
            end = 4 + int.from_bytes(self._buffer[:4], "big")
            if end - 4 > MAX_FRAME_BYTES:
                raise ValueError(
                    f"a frame announces {end - 4} bytes, the limit is {MAX_FRAME_BYTES}: "
                    "the other end does not speak this protocol; close the connection"
                )
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[4:end])
            del self._buffer[:end]
            yield body
