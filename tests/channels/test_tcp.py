"""Large frames over TCP: whole, in order within a channel, and in nobody's way."""

import asyncio
import logging
import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import zmq
from channel_peers import Run
from hypothesis import given
from hypothesis import strategies as st
from peer_process import Echo as Note

from channels import messages
from channels.channel import ChannelRouter
from channels.errors import BadFrame
from channels.protocol import ChannelOffer
from channels.socket_endpoint import SocketEndpoint
from channels.tensors.tcp import CHUNK_BYTES, IDENTITY_SUFFIX, BulkReceiver, Transfer


class Pair:
    """Two endpoints that are connected to each other over loopback."""

    def __init__(self) -> None:
        self.a = SocketEndpoint("a", "tcp://127.0.0.1:*")
        self.b = SocketEndpoint("b", "tcp://127.0.0.1:*")
        self.a.connect("b", self.b.address)
        self.b.connect("a", self.a.address)
        self.box: asyncio.Queue[tuple[Any, Any]] = asyncio.Queue()
        self.b.on_message = lambda _, message, tree: self.box.put_nowait((message, tree))

    def close(self) -> None:
        self.a.close()
        self.b.close()


def offer(depth: int) -> ChannelOffer:
    """A message of a channel."""
    return ChannelOffer(channel="work", epoch=0, link=0, depth=depth)


def test_large_arrays_arrive_whole_and_keep_the_order_of_their_channel(run: Run) -> None:
    """What belongs to no channel passes by; what belongs to the same one waits."""

    async def main() -> None:
        pair = Pair()
        large = np.random.default_rng(0).integers(0, 255, 40 * CHUNK_BYTES + 17, np.uint8)
        pair.a.send("b", offer(1), {"x": large, "y": large[: CHUNK_BYTES + 1], "z": large[:10]})
        pair.a.send("b", offer(2))
        pair.a.send("b", offer(3), np.arange(CHUNK_BYTES))
        pair.a.send("b", Note(number=4))
        arrived = [await pair.box.get() for _ in range(4)]
        assert [message for message, _ in arrived] == [Note(number=4), offer(1), offer(2), offer(3)]
        tree = arrived[1][1]
        np.testing.assert_array_equal(tree["x"], large)
        np.testing.assert_array_equal(tree["y"], large[: CHUNK_BYTES + 1])
        np.testing.assert_array_equal(tree["z"], large[:10])
        np.testing.assert_array_equal(arrived[3][1], np.arange(CHUNK_BYTES))
        pair.a.send("b", offer(5))
        assert (await pair.box.get())[0] == offer(5)
        pair.close()

    run(main)


def test_disconnecting_forgets_what_is_half_there(run: Run) -> None:
    """And the next connection of that name starts anew."""

    async def main() -> None:
        pair = Pair()
        pair.a.send("b", offer(1), np.zeros(200 * CHUNK_BYTES, np.uint8))
        first = asyncio.Event()
        incoming = pair.b._incoming
        chunk = incoming.chunk

        def noticing(sender: str, head: bytes, data: memoryview) -> None:
            first.set()
            chunk(sender, head, data)

        incoming.chunk = noticing  # type: ignore[method-assign]
        await first.wait()
        assert incoming._arriving["a"]
        pair.b.disconnect("a")
        assert "a" not in incoming._held
        pair.a.disconnect("b")
        pair.a.connect("b", pair.b.address)
        pair.a.send("b", offer(2), np.ones(2 * CHUNK_BYTES, np.uint8))
        message, tree = await pair.box.get()
        assert message == offer(2)
        assert tree.sum() == 2 * CHUNK_BYTES
        pair.close()

    run(main)


def test_an_item_of_many_chunks_through_a_channel(run: Run) -> None:
    """Call and result are both large; the caller that is cancelled leaves nothing behind."""

    async def main() -> None:
        pair = Pair()
        producer = ChannelRouter(pair.a).producer("work", bound=2, epoch=0)
        consumer = ChannelRouter(pair.b).consumer("work", capacity=2)
        producer.add_consumer("b")
        consumer.add_producer("a")
        data = np.arange(3 * CHUNK_BYTES // 8)
        call = asyncio.create_task(producer.call(data))
        item = await consumer.get()
        item.ack(item.payload + 1)
        np.testing.assert_array_equal(await call, data + 1)
        call = asyncio.create_task(producer.call(np.zeros(64 * CHUNK_BYTES, np.uint8)))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        call = asyncio.create_task(producer.call(data))
        while (item := await consumer.get()).cancelled:
            item.ack()
        item.ack(item.payload + 2)
        np.testing.assert_array_equal(await call, data + 2)
        pair.close()

    run(main)


def test_garbage_on_the_second_connection(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Each is logged and dropped; nothing is allocated for a frame that may not come."""

    async def main() -> None:
        b = SocketEndpoint("b", "tcp://127.0.0.1:*", max_payload_bytes=8 * CHUNK_BYTES)
        box: asyncio.Queue[Any] = asyncio.Queue()
        b.on_message = lambda _, message, tree: box.put_nowait((message, tree))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        rogue = context.socket(zmq.DEALER)
        rogue.setsockopt(zmq.ROUTING_ID, b"a" + IDENTITY_SUFFIX)
        rogue.connect(b.address)
        for number, nbytes, offset, data in (
            *((1, 0, 0, b"x"), (2, 2**62, 0, b"x"), (3, 10, 5, b"x"), (4, 1, 0, b"xx")),
            *((5, 10, 0, b"xxxxx"), (5, 11, 5, b"x"), (6, 2, 0, b"x"), (6, 2, 0, b"x")),
        ):
            rogue.send_multipart([struct.pack("<QQQ", number, nbytes, offset), data])
        rogue.send_multipart([b"short", b"x"])
        named = context.socket(zmq.DEALER)
        named.setsockopt(zmq.ROUTING_ID, b"a")
        named.connect(b.address)
        note = messages.encode(Note(number=1))
        for place in (b"short", struct.pack("<QQ", 1, 0), struct.pack("<QQ", 1, 2**40)):
            named.send_multipart([note, b"\xc0", b"", b"\x02", place])
        named.send_multipart([note])
        assert await box.get() == (Note(number=1), None)
        last = struct.pack("<QQQ", 7, 1, 0)
        rogue.send_multipart([last, b"x"])
        whole = asyncio.Event()
        take = b._incoming._deliver
        b._incoming._deliver = lambda sender: (whole.set(), take(sender))[1]  # type: ignore[method-assign]
        await whole.wait()
        assert not b._incoming._arriving["a"]
        for socket in (rogue, named):
            socket.close(0)
        b.close()

    with caplog.at_level(logging.WARNING, "channels.socket_endpoint"):
        run(main)
    assert sum("dropped frame" in r.getMessage() for r in caplog.records) == 10


@given(st.data())
def test_lanes_keep_their_order_whatever_comes_first(data: st.DataObject) -> None:
    """Messages and chunks of one sender in any interleaving: each lane delivers in its order, and all of it."""
    receiver = BulkReceiver(limit=100)
    sizes = data.draw(st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 3)), max_size=12))
    delivered: list[tuple[str, int]] = []
    number = 0
    events: list[Callable[[], None]] = []
    chunks: list[tuple[bytes, memoryview]] = []
    for index, (lane, count) in enumerate(sizes):
        transfers = [Transfer(number + n, 3) for n in range(count)]
        number += count

        def message(lane: str = lane, index: int = index, transfers: Any = transfers) -> None:
            def deliver() -> None:
                assert [bytes(receiver.take("s", t)) for t in transfers] == [b"abc"] * len(
                    transfers
                )
                delivered.append((lane, index))

            if not receiver.hold("s", lane, transfers, deliver):
                deliver()

        events.append(message)
        for transfer in transfers:
            for offset, part in ((0, b"ab"), (2, b"c")):
                head = struct.pack("<QQQ", transfer.number, 3, offset)
                chunks.append((head, memoryview(part)))
    waiting = [list(events), [partial(receiver.chunk, "s", *chunk) for chunk in chunks]]
    while any(waiting):
        side = data.draw(st.sampled_from([each for each in waiting if each]))
        side.pop(0)()
    for lane in "xy":
        assert [i for name, i in delivered if name == lane] == [
            i for i, (name, _) in enumerate(sizes) if name == lane
        ]
    with pytest.raises(BadFrame):
        receiver.take("s", Transfer(0, 3))
