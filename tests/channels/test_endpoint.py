"""Endpoints: order, identity, isolation, on both loops and between real processes."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from channel_peers import Peer, Run
from peer_process import Echo as Note

from channels import messages
from channels.endpoint import Endpoint
from channels.errors import ChannelError, Closed, PeerLost, TooLarge
from channels.inline import InlineHub
from channels.messages import Message
from channels.socket_endpoint import SocketEndpoint

Make = Callable[[str], Endpoint]
Received = tuple[str, Message, Any]


@pytest.fixture(params=["zmq", "shared", "inline"])
def new(request: pytest.FixtureRequest, sockets: Path) -> Make:
    """Makes endpoints of one kind that can reach each other."""
    hubs: list[InlineHub] = []
    count = iter(range(1000))

    def make(name: str) -> Endpoint:
        if request.param != "inline":
            shared_dir = sockets / "shared" if request.param == "shared" else None
            return SocketEndpoint(name, f"ipc://{sockets}/{next(count)}", shared_dir=shared_dir)
        if not hubs:
            hubs.append(InlineHub())
        return hubs[0].endpoint(name)

    return make


def mailbox(endpoint: Endpoint) -> "asyncio.Queue[Received]":
    """A queue of what the endpoint receives."""
    queue: asyncio.Queue[Received] = asyncio.Queue()
    endpoint.on_message = lambda *received: queue.put_nowait(received)
    return queue


def test_messages_arrive_in_order_with_sender_and_payload(run: Run, new: Make) -> None:
    """More than one turn of the reader's, so that what remains is not forgotten."""

    async def main() -> None:
        a, b = new("job/a"), new("job/b")
        box = mailbox(b)
        a.connect("job/b", b.address)
        for number in range(1000):
            a.send("job/b", Note(number=number), {"n": number})
        for number in range(1000):
            assert await box.get() == ("job/a", Note(number=number), {"n": number})
        a.send("job/b", Note(number=-1))
        assert await box.get() == ("job/a", Note(number=-1), None)
        a.close()
        b.close()

    run(main)


def test_large_arrays_travel_whole(run: Run, new: Make) -> None:
    """Eight megabytes beside small ones."""

    async def main() -> None:
        a, b = new("a"), new("b")
        box = mailbox(b)
        a.connect("b", b.address)
        large = np.random.default_rng(0).random(2**20)
        a.send("b", Note(number=1), [large, large[:5], "text"])
        _, _, tree = await box.get()
        assert np.array_equal(tree[0], large)
        assert np.array_equal(tree[1], large[:5])
        assert tree[2] == "text"
        a.close()
        b.close()

    run(main)


def test_handler_never_runs_within_send(run: Run, new: Make) -> None:
    """A handler that sends, and a sender in the middle of its work, never meet."""

    async def main() -> None:
        a, b = new("a"), new("b")
        a.connect("b", b.address)
        b.connect("a", a.address)
        sending = False
        done = asyncio.Event()

        def on_a(sender: str, message: Message, payload: Any) -> None:
            assert not sending
            done.set()

        def on_b(sender: str, message: Message, payload: Any) -> None:
            nonlocal sending
            assert not sending
            sending = True
            b.send("a", message)
            sending = False

        a.on_message, b.on_message = on_a, on_b
        sending = True
        a.send("b", Note(number=1))
        sending = False
        await done.wait()
        a.close()
        b.close()

    run(main)


def test_handler_that_raises_is_reported_and_the_next_message_is_handled(
    sockets: Path, new: Make
) -> None:
    """The loop's exception handler hears of it; the mailbox lives."""

    async def main() -> None:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, c: reported.append(c))
        a, b = new("a"), new("b")
        a.connect("b", b.address)
        done = asyncio.Event()

        def handle(sender: str, message: Message, payload: Any) -> None:
            assert isinstance(message, Note)
            if message.number == 1:
                raise RuntimeError("a bug")
            done.set()

        b.on_message = handle
        a.send("b", Note(number=1))
        a.send("b", Note(number=2))
        await asyncio.wait_for(done.wait(), 10)
        assert [str(context["exception"]) for context in reported] == ["a bug"]
        a.close()
        b.close()

    asyncio.run(main())


def test_unconnected_disconnected_and_closed(run: Run, new: Make) -> None:
    """Each says what it is."""

    async def main() -> None:
        a, b = new("a"), new("b")
        with pytest.raises(PeerLost, match="a is not connected to b"):
            a.send("b", Note(number=1))
        a.connect("b", b.address)
        a.connect("b", b.address)
        a.disconnect("b")
        a.disconnect("b")
        with pytest.raises(PeerLost):
            a.send("b", Note(number=1))
        a.close()
        a.close()
        with pytest.raises(Closed):
            a.send("b", Note(number=1))
        with pytest.raises(Closed):
            a.connect("b", b.address)
        b.close()

    run(main)


def test_message_sent_before_the_peer_exists_arrives(run: Run, sockets: Path) -> None:
    """Introductions may overtake the peer's own start."""

    async def main() -> None:
        hub = InlineHub()
        pairs = (
            (SocketEndpoint("a", f"ipc://{sockets}/a"), f"ipc://{sockets}/b", SocketEndpoint),
            (hub.endpoint("a"), "inline://b", hub.endpoint),
        )
        for a, address, make in pairs:
            a.connect("b", address)
            a.send("b", Note(number=1))
            b = make("b", address)
            box = mailbox(b)
            assert (await box.get())[1] == Note(number=1)
            a.close()
            b.close()

    run(main)


def test_new_address_replaces_the_old_connection(run: Run, new: Make) -> None:
    """A restarted peer has the same name and another address."""

    async def main() -> None:
        a, b, again = new("a"), new("b"), new("b")
        old, box = mailbox(b), mailbox(again)
        a.connect("b", b.address)
        a.send("b", Note(number=1))
        await old.get()
        a.connect("b", again.address)
        a.send("b", Note(number=2))
        assert (await box.get())[1] == Note(number=2)
        assert old.empty()
        for endpoint in (a, b, again):
            endpoint.close()

    run(main)


def test_peer_that_connects_again_takes_its_name_over(run: Run, new: Make) -> None:
    """A second life of the same name is heard although the first one's connection was never closed."""

    async def main() -> None:
        b = new("b")
        box = mailbox(b)
        first, second = new("a"), new("a")
        first.connect("b", b.address)
        first.send("b", Note(number=1))
        assert (await box.get())[:2] == ("a", Note(number=1))
        second.connect("b", b.address)
        second.send("b", Note(number=2))
        assert (await box.get())[:2] == ("a", Note(number=2))
        for endpoint in (first, second, b):
            endpoint.close()

    run(main)


class _Drops(logging.Handler):
    """Sets `all_seen` once so many frames were reported as dropped."""

    def __init__(self, number: int) -> None:
        super().__init__(logging.WARNING)
        self.left = number
        self.all_seen = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "dropped frame" in record.getMessage():
            self.left -= 1
            if self.left == 0:
                self.all_seen.set()


def test_garbage_is_logged_and_dropped(run: Run, sockets: Path) -> None:
    """No frame from outside stops the mailbox, whatever it holds."""

    async def main() -> None:
        b = SocketEndpoint("b", "tcp://127.0.0.1:*")
        box = mailbox(b)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        rogue = context.socket(zmq.DEALER)
        rogue.setsockopt(zmq.ROUTING_ID, b"\xff\xfe")
        nameless = context.socket(zmq.DEALER)
        named = context.socket(zmq.DEALER)
        named.setsockopt(zmq.ROUTING_ID, b"rogue")
        note = messages.encode(Note(number=1))
        for socket in (rogue, nameless, named):
            socket.connect(b.address)
        rogue.send(note)
        nameless.send(note)
        for parts in (
            *([b""], [b"\x01garbage"], [note, b"\xc1"]),
            # The fourth says what kinds the frames after it are: bytes, places in shared memory.
            *([note, b"\xc0", b"x", b"y"], [note, b"\xc0", b"x", b"\x01", b"y"]),
            [note, b"\xc0", b"x", b"\x00", b"y"],
        ):
            named.send_multipart(parts)
        named.send_multipart([note, b"\xc3"])
        # The last but one is good but for its superfluous buffers, which nothing refers to.
        assert await box.get() == ("rogue", Note(number=1), None)
        assert await box.get() == ("rogue", Note(number=1), True)
        assert box.empty()
        # The three connections are read in any order, so the box may be done before the last drop.
        await asyncio.wait_for(drops.all_seen.wait(), 10)
        for socket in (rogue, nameless, named):
            socket.close(0)
        b.close()

    drops = _Drops(7)
    logger = logging.getLogger("channels.socket_endpoint")
    logger.addHandler(drops)
    try:
        run(main)
    finally:
        logger.removeHandler(drops)
    assert drops.left == 0


def test_payload_over_the_limit_is_refused_at_the_sender(run: Run, sockets: Path) -> None:
    """With both sizes, before anything is sent."""

    async def main() -> None:
        a = SocketEndpoint("a", f"ipc://{sockets}/a", max_payload_bytes=1000)
        a.connect("b", f"ipc://{sockets}/b")
        with pytest.raises(TooLarge, match=r"payload of 20\d\d bytes is over the limit of 1000"):
            a.send("b", Note(number=1), np.zeros(250))
        a.close()

    run(main)


def test_bad_addresses_are_clear_errors(run: Run, sockets: Path) -> None:
    """Too long for the system, a missing directory, a port in use, a name without letters."""

    async def main() -> None:
        with pytest.raises(ChannelError, match=r"has 1\d\d bytes, the system allows 107"):
            SocketEndpoint("a", f"ipc://{sockets}/{'x' * 100}")
        with pytest.raises(ChannelError, match="cannot bind"):
            SocketEndpoint("a", f"ipc://{sockets}/missing/a")
        a = SocketEndpoint("a", "tcp://127.0.0.1:*")
        assert a.address.startswith("tcp://127.0.0.1:")
        assert not a.address.endswith("*")
        with pytest.raises(ChannelError, match="in use"):
            SocketEndpoint("b", a.address)
        with pytest.raises(ChannelError, match="cannot connect"):
            a.connect("b", "nonsense")
        with pytest.raises(ValueError, match="1 to 234 bytes"):
            SocketEndpoint("", f"ipc://{sockets}/b")
        a.close()

    run(main)


def test_close_removes_the_socket_file_and_lets_the_last_message_leave(
    run: Run, sockets: Path
) -> None:
    """A farewell sent just before closing still arrives."""

    async def main() -> None:
        a = SocketEndpoint("a", f"ipc://{sockets}/a")
        b = SocketEndpoint("b", f"ipc://{sockets}/b")
        box = mailbox(b)
        a.connect("b", b.address)
        a.send("b", Note(number=9))
        a.close()
        assert (await box.get())[1] == Note(number=9)
        b.close()

    run(main)
    assert list(sockets.iterdir()) == []


def test_echo_of_another_process(run: Run, sockets: Path, start: Callable[..., Peer]) -> None:
    """Over ipc and over tcp: many messages in flight, none lost, order kept."""

    async def main() -> None:
        for address in (f"ipc://{sockets}/here", "tcp://127.0.0.1:*"):
            here = SocketEndpoint("here", address)
            box = mailbox(here)
            there = f"ipc://{sockets}/there"
            peer = start("echo", "there", there, "here", here.address)
            assert await peer.says() == f"at {there}"
            assert await peer.says() == "ready"
            here.connect("there", there)
            for number in range(2000):
                here.send("there", Note(number=number), np.arange(number % 7))
            for number in range(2000):
                sender, message, tree = await box.get()
                assert (sender, message) == ("there", Note(number=number))
                assert len(tree) == number % 7
            here.disconnect("there")
            peer.stop()
            here.close()

    run(main)
