"""The contract of channels between processes, the same on every transport: crashes, memory, what is left behind."""

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from channel_peers import (
    DEVICE_TRANSPORTS,
    GPU_TRANSPORTS,
    HOST_TRANSPORTS,
    MakeWeb,
    Run,
    Start,
    Web,
    cancelled,
    until,
)

from channels.channel import Consumer
from channels.socket_endpoint import SHARED_FRAME_BYTES, SocketEndpoint

# What differs between the loops shows in test_conformance.py already; processes take time to start.
pytestmark = pytest.mark.parametrize("run", ["uvloop"], indirect=True)

SIZES = (8, SHARED_FRAME_BYTES - 1, SHARED_FRAME_BYTES)
MIB = 1 << 20

# Of arrays, as they are made there; below ON_DEVICE_FROM_BYTES and of text, devices see nothing.
sized = pytest.mark.parametrize(
    ("web", "size_bytes"),
    [
        *((name, size) for name in HOST_TRANSPORTS for size in SIZES),
        *((name, SIZES[-1]) for name in DEVICE_TRANSPORTS),
        *(pytest.param(*each.values, SIZES[-1], marks=each.marks) for each in GPU_TRANSPORTS),
    ],
    indirect=["web"],
)
without_arrays = pytest.mark.parametrize("web", HOST_TRANSPORTS, indirect=True)


@pytest.fixture(params=(*HOST_TRANSPORTS, *DEVICE_TRANSPORTS, *GPU_TRANSPORTS))
def web(request: pytest.FixtureRequest, sockets: Path) -> MakeWeb:
    """Makes a web on a transport between processes. A killed one leaves its arenas: flowd removes them."""
    return lambda **options: Web(request.param, sockets, **options)


async def consumer_of(web: Web, start: Start, role: str, *options: str, capacity: int = 4) -> Any:
    """Our consumer "c" of a process "p" that plays a producer's role, and that process."""
    consumer = web.router("c").consumer("work", capacity=capacity)
    peer = await web.join(start, role, "p", *options, of="c")
    consumer.add_producer("p")
    return consumer, peer


@sized
def test_items_arrive_whole_and_in_order(
    run: Run, web: MakeWeb, start: Start, size_bytes: int
) -> None:
    """Small ones, and arrays on both sides of the size from which they lie in shared memory."""

    async def main() -> None:
        w = web()
        options = ("--items", "50", "--size-bytes", str(size_bytes))
        consumer, peer = await consumer_of(w, start, "produce", *options)
        for number in range(50):
            item = await consumer.get()
            assert item.payload["number"] == number
            data = item.payload["data"]
            assert data.nbytes == size_bytes
            assert (data == number).all()
            item.ack()
        said, _, transport = (await peer.says()).split(maxsplit=2)
        assert said == "drained"
        if w.on_devices:
            assert transport == w.transport
            assert str(data.device) == w.device
        peer.stop()
        w.close()

    run(main)


def test_memory_stays_flat_beside_a_slow_consumer(run: Run, web: MakeWeb, start: Start) -> None:
    """A producer that could put 384 MiB at once holds what its bounds allow, and so does the consumer."""

    async def main() -> None:
        w = web()
        w.warm_up()
        items, size = 384, MIB
        options = ("--items", str(items), "--size-bytes", str(size), "--bound-bytes", str(4 * size))
        consumer, peer = await consumer_of(w, start, "produce", *options, capacity=8)
        process = psutil.Process()
        before = process.memory_info().rss
        most_held = 0
        most_rss = 0
        for number in range(items):
            item = await consumer.get()
            assert item.payload["data"][-1] == number % 251
            held = consumer.statistics()
            most_held = max(most_held, held.depth + held.in_flight)
            if number % 16 == 0:
                most_rss = max(most_rss, process.memory_info().rss)
            item.ack()
        said, grown, _ = (await peer.says()).split(maxsplit=2)
        assert said == "drained"
        assert most_held <= 5  # of capacity 8: fewer than bound_bytes and one item
        if w.real:  # there, libraries that come with the first transfer take more of the host
            assert torch.cuda.max_memory_reserved() < 96 * MIB
        else:
            assert most_rss - before < 96 * MIB
            assert int(grown) < 96 * MIB
        peer.stop()
        w.close()

    run(main)


@without_arrays
def test_a_fast_process_takes_what_a_slow_one_does_not(
    run: Run, web: MakeWeb, start: Start
) -> None:
    """While one consumer is stuck in its first item, the other one works off all the rest."""

    async def main() -> None:
        w = web()
        producer, slow = w.pair(bound=64, capacity=1)
        await w.join(start, "double", "fast")
        first = asyncio.create_task(producer.call(-1))
        held = await slow.get()
        producer.add_consumer("fast")
        assert await asyncio.gather(*(producer.call(n) for n in range(40))) == [
            2 * n for n in range(40)
        ]
        held.ack("at last")
        assert await first == "at last"
        w.close()

    run(main)


@sized
def test_killed_consumer_process_has_its_items_taken_by_another(
    run: Run, web: MakeWeb, start: Start, size_bytes: int
) -> None:
    """kill -9 in mid-item: nothing is lost, every call is answered by the survivor, no memory stays lent."""

    async def main() -> None:
        w = web()
        producer = w.router("p").producer("work", bound=100)
        victim = await w.join(start, "hold", "victim")
        producer.add_consumer("victim")
        sent = [w.array(size_bytes, n) for n in range(20)]
        calls = [asyncio.create_task(producer.call(data)) for data in sent]
        for n in range(4):
            assert await victim.says() == f"holds {n}"
        await w.join(start, "double", "survivor")
        producer.add_consumer("survivor")
        victim.kill()
        w.lose("victim")
        for n, answer in enumerate(await asyncio.gather(*calls)):
            assert (answer == 2 * n).all()
        calls.clear()
        sent.clear()
        del answer
        gc.collect()
        await until(lambda: blocks(w, "p") == 0)
        w.close()

    run(main)


def blocks(web: Web, name: str) -> int:
    """Blocks in use of a router's arena, its pool on a device, and its transfers over NCCL."""
    endpoint = web.routers[name].endpoint
    assert isinstance(endpoint, SocketEndpoint)
    shared = 0 if endpoint._arena is None else endpoint._arena.num_blocks
    lending, nccl = endpoint._devices._lending, endpoint._devices._nccl
    if lending is None or nccl is None:
        return shared
    return shared + lending.num_blocks + sum(len(peer.held) for peer in nccl._peers.values())


def test_killed_producer_process_cancels_its_items_and_its_successor_is_served(
    run: Run, web: MakeWeb, start: Start
) -> None:
    """kill -9 of a producer: taken items show cancelled; the restarted one's ten items all arrive."""

    async def main() -> None:
        w = web()
        consumer, peer = await consumer_of(w, start, "produce")
        items = [await consumer.get() for _ in range(2)]
        peer.kill()
        w.lose("p", of="c")
        assert all(item.cancelled for item in items)
        assert consumer.get_nowait() is None
        for item in items:
            item.ack()
        again = await w.join(start, "produce", "p", "--epoch", "1", of="c")
        consumer.add_producer("p")
        for number in range(10):
            item = await consumer.get()
            assert (item.payload["epoch"], item.payload["number"]) == (1, number)
            item.ack()
        assert (await again.says()).startswith("drained")
        w.close()

    run(main)


def test_producer_killed_in_mid_item_is_a_cancellation_within_a_second(
    run: Run, web: MakeWeb, start: Start
) -> None:
    """What it had sent of a large item never shows; its taken item is cancelled, and others are served."""

    async def main() -> None:
        w = web()
        consumer, peer = await consumer_of(w, start, "send_large", "--size-bytes", str(128 * MIB))
        (await consumer.get()).ack()
        small = await consumer.get()
        assert small.payload == "small"
        working = asyncio.create_task(small.wait_cancelled())
        assert await peer.says() == "sending"
        died = time.monotonic()
        peer.process.kill()
        await asyncio.to_thread(peer.process.wait)  # flowd waits on its pidfd, and says Forget
        w.lose("p", of="c")
        await working
        assert time.monotonic() - died < 1.0
        small.ack()
        assert consumer.get_nowait() is None
        again = await w.join(start, "produce", "p", "--epoch", "1", "--items", "1", of="c")
        consumer.add_producer("p")
        item = await consumer.get()
        assert item.payload["epoch"] == 1
        item.ack()
        assert (await again.says()).startswith("drained")
        w.close()

    run(main)


@without_arrays
def test_cancellation_reaches_the_other_process(run: Run, web: MakeWeb, start: Start) -> None:
    """An abandoned call is shown to the consumer that works on it."""

    async def main() -> None:
        w = web()
        producer = w.router("p").producer("work", bound=4)
        peer = await w.join(start, "hold", "a")
        producer.add_consumer("a")
        call = asyncio.create_task(producer.call("x"))
        assert await peer.says() == "holds x"
        await cancelled(call)
        assert await peer.says() == "cancelled x"
        w.close()

    run(main)


async def take(consumer: Consumer) -> Any:
    """The next item's array, its item acknowledged: the array is all that holds its memory."""
    item = await consumer.get()
    item.ack()
    return item.payload


def test_an_array_outlives_its_item_unchanged_and_frees_its_block_when_collected(
    run: Run, sockets: Path
) -> None:
    """Acknowledged is not yet unread: the producer's next arrays go elsewhere until the last view is gone."""

    async def main() -> None:
        w = Web("shared_memory", sockets)
        producer, consumer = w.pair(bound=2, capacity=2)
        await producer.put(np.full(SHARED_FRAME_BYTES, 7, np.uint8))
        kept = (await take(consumer))[100:200]
        await producer.drained()
        for number in range(50):
            await producer.put(np.full(SHARED_FRAME_BYTES, number, np.uint8))
            assert (await take(consumer) == number).all()
            assert (kept == 7).all()
        await producer.drained()
        del kept
        gc.collect()
        await until(lambda: blocks(w, "p") == 0)
        assert list(w.shared.glob("*.arena"))
        w.close()
        assert not list(w.shared.glob("*.arena"))

    run(main)


def test_what_an_arena_has_no_room_for_goes_through_the_socket(run: Run, sockets: Path) -> None:
    """Ten arrays at once, room for two: all arrive whole, and the arena keeps to its limit."""

    async def main() -> None:
        w = Web("shared_memory", sockets)
        producer, consumer = w.pair(bound=10, capacity=10)
        endpoint = w.routers["p"].endpoint
        assert isinstance(endpoint, SocketEndpoint)
        assert endpoint._arena is not None
        endpoint._arena.limit_bytes = 2 * SHARED_FRAME_BYTES
        for number in range(10):
            await producer.put(np.full(SHARED_FRAME_BYTES, number, np.uint8))
        assert blocks(w, "p") == 2
        items = [await consumer.get() for _ in range(10)]
        for number, item in enumerate(items):
            assert (item.payload == number).all()
            item.ack()
        assert endpoint._arena.size_bytes == 2 * SHARED_FRAME_BYTES
        await producer.drained()
        w.close()

    run(main)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_processes_on_one_gpu_are_not_connected_by_nccl(
    run: Run, sockets: Path, start: Start
) -> None:
    """It would hang; their tensors go through the host, as they are on two nodes for all that they know."""

    async def main() -> None:
        w = Web("nccl on GPUs", sockets)
        consumer = w.router("c").consumer("work", capacity=4)
        peer = await w.join(start, "produce", "p", "--size-bytes", str(MIB), of="c", sees="0")
        consumer.add_producer("p")
        for number in range(10):
            item = await consumer.get()
            assert (item.payload["data"] == number).all()
            item.ack()
        assert (await peer.says()).split()[2] == "tcp"
        w.close()

    run(main)
