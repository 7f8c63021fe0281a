"""TCP between members of a cluster: what they send arrives and cannot be read, and nobody else comes in."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import zmq
from channel_peers import Run, settle
from peer_process import Echo as Note

from channels import messages
from channels.errors import ChannelError
from channels.security import KEY_BYTES, Security
from channels.socket_endpoint import SocketEndpoint
from channels.sockets import DrainedSocket
from channels.tensors.tcp import CHUNK_BYTES, IDENTITY_SUFFIX

ADDRESS = "tcp://127.0.0.1:*"
PATTERN = b"nobody else is to read this"
GREETING_BYTES = 64  # of ZMTP 3
LARGE = np.frombuffer(PATTERN * (3 * CHUNK_BYTES // len(PATTERN)), np.uint8)

pytestmark = pytest.mark.parametrize("run", ["uvloop"], indirect=True)


class Relay:
    """A machine between two: passes bytes on to an address, keeps them, and may change them."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self.seen: list[bytearray] = []  # of each connection, from who connected
        self.change: Callable[[bytes], bytes] = bytes

    async def port(self) -> int:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", self._port)
        kept = bytearray()
        self.seen.append(kept)
        self._writers += [writer, onward]

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(1 << 18):
                    if source is reader:
                        kept.extend(data)
                        data = self.change(data)
                    target.write(data)
                    await target.drain()
            target.transport.abort()

        self._tasks += [
            asyncio.create_task(copy(reader, onward)),
            asyncio.create_task(copy(there, writer)),
        ]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._tasks)
        await settle()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def member(name: str, security: Security | None) -> tuple[SocketEndpoint, asyncio.Queue[Any]]:
    """An endpoint at loopback, and what arrives there."""
    endpoint = SocketEndpoint(name, ADDRESS, security=security)
    box: asyncio.Queue[Any] = asyncio.Queue()
    endpoint.on_message = lambda *message: box.put_nowait(message)
    return endpoint, box


class Refusals(logging.Handler):
    """What was logged about refused connections and dropped frames."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._more.set()

    async def of(self, *words: str) -> list[str]:
        """The lines with these words, once there are any."""
        while True:
            found = [line for line in self.lines if all(word in line for word in words)]
            if found:
                return found
            self._more.clear()
            await self._more.wait()


@pytest.fixture
def security() -> Security:
    return Security(secrets.token_bytes(KEY_BYTES))


@pytest.fixture
def refusals() -> Iterator[Refusals]:
    handler = Refusals()
    logger = logging.getLogger("channels")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def rogue(address: str, name: bytes, settings: Callable[[Any], None] = bool) -> "zmq.Socket[bytes]":
    """A bare client that says it is `name`, with a message of ours on its way."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.ROUTING_ID, name)
    settings(socket)
    socket.connect(address)
    socket.send(messages.encode(Note(number=-1)))
    return socket


@pytest.mark.parametrize("plain_bulk", [False, True])
def test_what_crosses_the_network(run: Run, security: Security, plain_bulk: bool) -> None:
    """Messages and small arrays are enciphered, and large ones too unless the owner wants them in the clear."""

    async def main() -> None:
        keys = Security(security.key, plain_bulk)
        a, _ = member("a", keys)
        b, box = member("b", keys)
        address, _, bulk = b.address.partition("?bulk=")
        assert bool(bulk) == plain_bulk
        relays = [Relay(port_of(address))]
        address = f"tcp://127.0.0.1:{await relays[0].port()}"
        if plain_bulk:
            port, _, nonce = bulk.partition(".")
            relays.append(Relay(int(port)))
            address += f"?bulk={await relays[1].port()}.{nonce}"
        a.connect("b", address)
        small = LARGE[: 4 * len(PATTERN)]
        a.send("b", Note(number=1), {"small": small, "large": LARGE})
        sender, message, tree = await box.get()
        assert (sender, message) == ("a", Note(number=1))
        np.testing.assert_array_equal(tree["small"], small)
        np.testing.assert_array_equal(tree["large"], LARGE)
        enciphered, *clear = [b"".join(map(bytes, relay.seen)) for relay in relays]
        assert PATTERN not in enciphered
        assert len(enciphered) > (0 if plain_bulk else LARGE.nbytes)
        for seen in clear:  # the test would see it: here it is
            assert seen.count(PATTERN) > LARGE.nbytes / len(PATTERN) - 10
        expected = "tcp (curve, plain bulk)" if plain_bulk else "tcp (curve)"
        assert a.transport("b").name == expected
        for relay in relays:
            await relay.close()
        a.close()
        b.close()

    run(main)


def test_plain_bulk_needs_both_ends(run: Run, security: Security) -> None:
    """Whoever did not say so gets and sends large arrays enciphered."""

    async def main() -> None:
        a, at_a = member("a", Security(security.key, plain_bulk=True))
        b, at_b = member("b", security)
        a.connect("b", b.address)
        b.connect("a", a.address)
        for sender, receiver, box in ((a, "b", at_b), (b, "a", at_a)):
            assert sender.transport(receiver).name == "tcp (curve)"
            sender.send(receiver, Note(number=1), LARGE)
            np.testing.assert_array_equal((await box.get())[2], LARGE)
        a.close()
        b.close()

    run(main)


def wrong_key(socket: "zmq.Socket[bytes]", security: Security) -> None:
    """As a member would, but with a key pair of its own: the mailbox's public key has leaked."""
    security.identify(socket)
    public, secret = zmq.curve_keypair()
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def test_outsiders_are_refused_and_told_once(
    run: Run, security: Security, refusals: Refusals
) -> None:
    """A plain client, one with a wrong key, one of another cluster, under a member's name; the member goes on."""

    async def main() -> None:
        a, _ = member("a", security)
        b, box = member("b", security)
        a.connect("b", b.address)
        a.send("b", Note(number=0))
        assert (await box.get())[:2] == ("a", Note(number=0))
        other = Security(secrets.token_bytes(KEY_BYTES))
        outsiders = [
            rogue(b.address, b"a"),
            rogue(b.address, b"a", lambda socket: wrong_key(socket, security)),
            rogue(b.address, b"a", other.identify),
            rogue(b.address, b"a\x1fbulk"),
        ]
        await refusals.of("refused connection to b", "none")
        await refusals.of("refused connection to b", "has not the key")
        # One that left tries again and again: by then it was refused several times.
        tries: asyncio.Queue[Any] = asyncio.Queue()
        monitor = outsiders[2].get_monitor_socket(zmq.EVENT_CONNECTED)
        watch = DrainedSocket(monitor, tries.put_nowait)
        for _ in range(3):
            await tries.get()
        a.send("b", Note(number=1), LARGE)
        assert (await box.get())[1] == Note(number=1)
        assert box.empty()
        lines = await refusals.of("refused connection to b")
        assert len(lines) == len(set(lines))
        outsiders[2].disable_monitor()
        watch.close()
        for socket in outsiders:
            socket.close(0)
        a.close()
        b.close()

    run(main)


@pytest.mark.parametrize("key", [None, secrets.token_bytes(KEY_BYTES)], ids=["none", "another"])
def test_an_endpoint_outside_the_cluster_learns_why_it_is_not_heard(
    run: Run, security: Security, refusals: Refusals, key: bytes | None
) -> None:
    """Nothing passes in either direction, and the member's log says who could not be reached."""

    async def main() -> None:
        inside, at_inside = member("inside", security)
        outside, at_outside = member("outside", None if key is None else Security(key))
        inside.connect("outside", outside.address)
        outside.connect("inside", inside.address)
        inside.send("outside", Note(number=1))
        outside.send("inside", Note(number=2), LARGE)
        await refusals.of("refused connection of inside to outside")
        await refusals.of("refused connection to inside")
        if key is not None:
            await refusals.of("refused connection of outside to inside", "another cluster's key")
        assert at_inside.empty()
        assert at_outside.empty()
        inside.close()
        outside.close()

    run(main)


def test_without_a_key_only_loopback_is_used(run: Run, security: Security) -> None:
    """Neither bound nor connected to; with one, any address of the machine will do."""

    async def main() -> None:
        for host in ("*", "0.0.0.0", "192.0.2.1", "lo"):
            with pytest.raises(ChannelError, match="has no cluster key"):
                SocketEndpoint("a", f"tcp://{host}:*")
        SocketEndpoint("a", "tcp://127.0.0.2:*").close()
        a = SocketEndpoint("a", ADDRESS)
        with pytest.raises(ChannelError, match="without a key only loopback"):
            a.connect("b", "tcp://192.0.2.1:7780")
        with pytest.raises(ChannelError, match="not the address of a mailbox"):
            a.connect("b", f"{a.address}?bulk=1.xyz")
        a.close()
        SocketEndpoint("a", "tcp://0.0.0.0:*", security=security).close()

    run(main)


class ClearPort:
    """Members "a" and "b", who want large frames in the clear; those of "a" go through a relay."""

    def __init__(self, security: Security) -> None:
        keys = Security(security.key, plain_bulk=True)
        self.a, _ = member("a", keys)
        self.b, self.box = member("b", keys)
        self.address, _, bulk = self.b.address.partition("?bulk=")
        port, _, self.nonce = bulk.partition(".")
        self.port = int(port)
        self.relay = Relay(self.port)

    async def meet(self) -> None:
        self.b.connect("a", self.a.address)
        self.a.connect("b", f"{self.address}?bulk={await self.relay.port()}.{self.nonce}")

    async def close(self) -> None:
        self.a.close()
        self.b.close()
        await self.relay.close()


def test_chunks_that_are_sent_again_or_made_up(
    run: Run, security: Security, refusals: Refusals
) -> None:
    """What somebody recorded and plays again, and what is no chunk: dropped, and told once."""

    async def main() -> None:
        both = ClearPort(security)
        await both.meet()
        both.a.send("b", Note(number=1), LARGE)
        np.testing.assert_array_equal((await both.box.get())[2], LARGE)
        both.a.disconnect("b")

        reader, writer = await asyncio.open_connection("127.0.0.1", both.port)
        recorded = bytes(both.relay.seen[0])
        begin = GREETING_BYTES + 2 + recorded[GREETING_BYTES + 1]  # with the READY command
        writer.write(recorded[:begin])
        answer = await reader.readexactly(GREETING_BYTES + 2)
        await reader.readexactly(answer[-1])
        writer.write(recorded[begin:])
        await refusals.of("dropped frame endpoint=b", "a replay")
        writer.transport.abort()

        strangers = []
        for frames in ([b"head", b"mark", b"data", b"more"], [b"head", b"mark", b"data"]):
            socket = zmq.Context.instance().socket(zmq.DEALER)
            socket.setsockopt(zmq.ROUTING_ID, b"a" + IDENTITY_SUFFIX + secrets.token_bytes(16))
            socket.connect(f"tcp://127.0.0.1:{both.port}")
            socket.send_multipart(frames)
            strangers.append(socket)
        await refusals.of("dropped frame", "not a chunk with a tag")
        await refusals.of("dropped frame", "not the tag of a chunk")
        assert len(refusals.lines) == len(set(refusals.lines))
        assert both.box.empty()
        for socket in strangers:
            socket.close(0)
        await both.close()

    run(main)


def test_chunks_that_are_changed_on_the_way(
    run: Run, security: Security, refusals: Refusals
) -> None:
    """The message that they belong to stays out; one of a new connection does not."""

    async def main() -> None:
        both = ClearPort(security)
        both.relay.change = lambda data: data.replace(PATTERN, PATTERN.upper())
        await both.meet()
        both.a.send("b", Note(number=1), LARGE)
        await refusals.of("dropped frame", "a chunk whose tag is not of this cluster")
        both.a.disconnect("b")
        both.b.disconnect("a")
        both.a.connect("b", both.b.address)
        both.a.send("b", Note(number=2), LARGE)
        sender, message, tree = await both.box.get()
        assert (sender, message) == ("a", Note(number=2))
        np.testing.assert_array_equal(tree, LARGE)
        await both.close()

    run(main)


def test_a_second_mailbox_for_other_nodes(run: Run, security: Security, sockets: Any) -> None:
    """A Unix socket for those on the node, TCP for the others; both lead to the same handler."""

    async def main() -> None:
        both = SocketEndpoint("both", f"ipc://{sockets}/both", listen=ADDRESS, security=security)
        box: asyncio.Queue[Any] = asyncio.Queue()
        both.on_message = lambda *message: box.put_nowait(message)
        near = SocketEndpoint("near", f"ipc://{sockets}/near", security=security)
        far, _ = member("far", security)
        assert near.remote_address == ""
        assert far.remote_address == far.address
        near.connect("both", both.address)
        far.connect("both", both.remote_address)
        near.send("both", Note(number=1))
        assert (await box.get())[:2] == ("near", Note(number=1))
        far.send("both", Note(number=2))
        assert (await box.get())[:2] == ("far", Note(number=2))
        with pytest.raises(ChannelError, match="cannot bind"):
            SocketEndpoint("c", f"ipc://{sockets}/c", listen=both.remote_address, security=security)
        for endpoint in (both, near, far):
            endpoint.close()

    run(main)


def test_a_key_is_not_printed(run: Run, security: Security) -> None:
    """Neither by a message or job that carries it, nor by an error about it."""
    assert repr(security) == f"Security(cluster={security.cluster}, plain_bulk=False)"
    assert security.cluster == Security(security.key, plain_bulk=True).cluster
    with pytest.raises(ValueError, match="a cluster key of 5 bytes") as error:
        Security(b"short")
    assert "short" not in str(error.value)
