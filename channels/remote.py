"""The TCP side of an endpoint: a mailbox that other nodes reach, and connections to those of others.

With a `Security` every connection is a CURVE one, and only members of the cluster come in. Without one, nothing but
loopback is bound or connected to. An address is "tcp://HOST:PORT"; that of a mailbox which takes large frames in the
clear goes on with "?bulk=PORT.NONCE", see `channels.tensors.tags`: a second port, where each chunk has to have its tag.
"""

import ipaddress
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import zmq

from channels.errors import BadFrame, ChannelError
from channels.handshakes import HandshakeWatch
from channels.security import Security
from channels.sockets import Connection, DrainedSocket, Frame, Part, send_parts
from channels.tensors.tcp import (
    CHUNK_BYTES,
    CONNECTION_BYTES,
    IDENTITY_SUFFIX,
    IN_FLIGHT,
    BulkSender,
)

if TYPE_CHECKING:
    from channels.tensors.tags import TagCheck

log = logging.getLogger(__name__)

# An identity has 255 bytes, and those of bulk connections are longer than the name.
MAX_NAME_BYTES = 255 - len(IDENTITY_SUFFIX) - CONNECTION_BYTES
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1000
TAGGED_FRAMES = 4  # of a chunk in the clear: identity, head, mark, bytes

_BULK = "?bulk="


class _Place(NamedTuple):
    """What an address says."""

    address: str  # as ZeroMQ takes it
    bulk_port: str = ""  # where large frames are taken in the clear, if they are
    nonce: bytes = b""

    @classmethod
    def read(cls, address: str) -> "_Place":
        plain, _, bulk = address.partition(_BULK)
        port, _, nonce = bulk.partition(".")
        try:
            return cls(plain, port, bytes.fromhex(nonce))
        except ValueError as error:
            raise ChannelError(f"{address} is not the address of a mailbox: {error}") from error

    @property
    def host(self) -> str:
        return self.address.removeprefix("tcp://").rpartition(":")[0]

    def bulk_address(self) -> str:
        return f"tcp://{self.host}:{self.bulk_port}"


class Remote:
    """See the module docstring. Made on the running loop.

    name: of the endpoint    received: takes the frames of each message, the first says whose it is
    chunk: takes those parts of large frames whose tag is good: sender, head, bytes. Raises BadFrame.
    """

    def __init__(
        self,
        name: str,
        security: Security | None,
        *,
        max_message_bytes: int,
        received: Callable[[Sequence[Frame]], None],
        chunk: Callable[[str, bytes, memoryview], None],
    ) -> None:
        self.address = ""
        self._name = name
        self._security = security
        self._max_message_bytes = max_message_bytes
        self._received = received
        self._chunk = chunk
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._mailboxes: list[DrainedSocket] = []
        self._watch: HandshakeWatch | None = None
        self._tags: TagCheck | None = None
        self._refused: set[str] = set()

    def listen(self, address: str) -> None:
        """Open the mailbox; `address` is then where it is, and what peers are told. Raises ChannelError."""
        router = self._router(self._max_message_bytes)
        if self._security is not None:
            self._security.guard(router)
            self._watch = HandshakeWatch(router, f"connection to {self._name}")
        self._bind(router, address)
        self._mailboxes.append(DrainedSocket(router, self._received))
        self.address = router.get_string(zmq.LAST_ENDPOINT)
        if self._security is not None and self._security.plain_bulk:
            # Not on top: OpenSSL takes 12 ms to load, which only members with plain bulk are to spend.
            from channels.tensors.tags import TagCheck

            self._tags = TagCheck(self._security)
            bulk = self._router(CHUNK_BYTES)
            bulk.setsockopt(zmq.RCVHWM, IN_FLIGHT)  # of each stranger, too
            self._bind(bulk, f"tcp://{_Place(self.address).host}:*")
            taken = DrainedSocket(bulk, self._tagged, per_turn=IN_FLIGHT)
            self._mailboxes.append(taken)
            port = bulk.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
            self.address += f"{_BULK}{port}.{self._tags.nonce.hex()}"

    def connect(self, peer: str, address: str) -> Connection:
        """A connection to a peer's mailbox. Raises ChannelError."""
        dealer = self._dealer(self._name.encode(), 0)
        watch = None
        if self._security is not None:
            self._security.identify(dealer)
            watch = HandshakeWatch(dealer, f"connection of {self._name} to {peer}")
        connection = _DealerConnection(dealer, watch)
        try:
            self._reach(dealer, peer, _Place.read(address).address)
        except ChannelError:
            connection.close()
            raise
        return connection

    def bulk(self, peer: str, address: str) -> BulkSender:
        """A connection for large frames to a peer. Raises ChannelError."""
        place = _Place.read(address)
        identity = self._name.encode() + IDENTITY_SUFFIX
        security = self._security
        tagger = None
        if security is not None and security.plain_bulk and place.bulk_port:
            from channels.tensors.tags import Tagger

            tagger = Tagger(security, self._name, place.nonce)
            identity += tagger.connection
        dealer = self._dealer(identity, IN_FLIGHT)
        if security is not None and tagger is None:
            security.identify(dealer)
        try:
            self._reach(dealer, peer, place.address if tagger is None else place.bulk_address())
        except ChannelError:
            dealer.close(0)
            raise
        return BulkSender(dealer, tagger)

    def describe(self, address: str) -> tuple[str, str]:
        """How payloads reach a mailbox at an address, and why so."""
        place = _Place.read(address)
        why = f"it listens at {place.address}, so it may be on another node"
        if self._security is None:
            return "tcp", why
        if self._security.plain_bulk and place.bulk_port:
            return "tcp (curve, plain bulk)", f"{why}; large arrays in the clear, with tags"
        return "tcp (curve)", f"{why}; enciphered"

    def close(self) -> None:
        """Close the mailbox; connections are their holders'."""
        if self._watch is not None:
            self._watch.close()
        for mailbox in self._mailboxes:
            mailbox.close()

    def _router(self, max_message_bytes: int) -> "zmq.Socket[bytes]":
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.RCVHWM, 0)
        router.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        # A peer that connects again (restarted, or with a new connection) takes its name over from
        # the old connection.
        router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        return router

    def _bind(self, router: "zmq.Socket[bytes]", address: str) -> None:
        try:
            self._check_closed_by_default(address)
            router.bind(address)
        except (ChannelError, zmq.ZMQError) as error:
            self.close()
            router.close(0)
            if isinstance(error, ChannelError):
                raise
            raise ChannelError(
                f"endpoint {self._name} cannot bind {address}: {error.strerror}"
            ) from error

    def _dealer(self, identity: bytes, high_water: int) -> "zmq.Socket[bytes]":
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, identity)
        dealer.setsockopt(zmq.SNDHWM, high_water)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        return dealer

    def _reach(self, dealer: "zmq.Socket[bytes]", peer: str, address: str) -> None:
        self._check_closed_by_default(address)
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            raise ChannelError(
                f"endpoint {self._name} cannot connect to {peer} at {address}: {error.strerror}"
            ) from error

    def _check_closed_by_default(self, address: str) -> None:
        if self._security is None and address.startswith("tcp://"):
            host = _Place(address).host
            if not _is_loopback(host):
                raise ChannelError(
                    f"endpoint {self._name} has no cluster key, and {address} is not of this machine "
                    "alone: without a key only loopback is used, as in tcp://127.0.0.1:*"
                )

    def _tagged(self, frames: list[zmq.Frame]) -> None:
        """A chunk came in the clear; anybody may have sent it."""
        assert self._tags is not None
        identity = frames[0].bytes
        name, connection = identity[:-CONNECTION_BYTES], identity[-CONNECTION_BYTES:]
        try:
            if len(frames) != TAGGED_FRAMES or not name.endswith(IDENTITY_SUFFIX):
                raise BadFrame("not a chunk with a tag")
            _, head, mark, data = frames
            sender = name.removesuffix(IDENTITY_SUFFIX).decode(errors="replace")
            self._tags.check(sender, connection, head.bytes, mark.bytes, data.buffer)
            self._chunk(sender, head.bytes, data.buffer)
        except BadFrame as error:
            if (reason := str(error)) not in self._refused and len(self._refused) < IN_FLIGHT:
                self._refused.add(reason)  # strangers are not to fill the log
                log.warning(
                    "dropped frame endpoint=%s sender=%r: %s (told once)",
                    self._name,
                    identity,
                    reason,
                )


class _DealerConnection:
    """A connection that is a ZeroMQ socket; it owns the socket, and the watch over it."""

    def __init__(self, socket: "zmq.Socket[bytes]", watch: HandshakeWatch | None) -> None:
        self._socket = socket
        self._watch = watch

    def send(self, parts: Sequence[Part]) -> None:
        """See `Connection`. Never blocks: the socket has no high-water mark."""
        send_parts(self._socket, parts)

    def close(self, linger_ms: int = 0) -> None:
        """See `Connection`."""
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger_ms)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
