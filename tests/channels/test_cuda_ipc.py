"""Device memory between processes: who holds what, what a receiver checks, and what real GPUs show."""

import gc
import threading
from collections.abc import Iterator

import msgspec
import pytest
import torch
from device_fakes import DEADLINE_S, FakeDevice, FakeNode, FakeStream
from device_peer import Peers

from channels.errors import BadFrame
from channels.tensors.cuda_ipc import (
    GRANULE_BYTES,
    MAX_BLOCKS,
    DeviceArena,
    DeviceOffer,
    DevicePlace,
    DeviceViews,
    Pool,
)
from channels.tensors.errors import DeviceUnreachable

POOL_BYTES = 2 * GRANULE_BYTES


class Pair:
    """A producer's arena and a receiver's views; each on its own view of a GPU."""

    def __init__(self, receiver_uuid: str = "GPU-0") -> None:
        self.node = FakeNode()
        self.producer = FakeDevice(self.node)
        self.receiver = FakeDevice(self.node, receiver_uuid)
        self.arena = DeviceArena(self.producer, size_bytes=POOL_BYTES)
        self.released = threading.Semaphore(0)
        self.views = DeviceViews(self.receiver, self.released.release)

    def sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the receiver sees of a tensor; nobody but the receiver holds it."""
        frame = self.arena.copy_in(tensor)
        assert frame is not None
        return self.views.open("producer", frame.lend("receiver"))

    def give_back(self, count: int = 1) -> None:
        """Wait until so many blocks can be returned, and return them."""
        for _ in range(count):
            assert self.released.acquire(timeout=DEADLINE_S)
        for sender, blocks in self.views.take_released().items():
            assert sender == "producer"
            self.arena.returned("receiver", blocks)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.views.close()


@pytest.fixture
def far() -> Iterator[Pair]:
    """The receiver is on another GPU."""
    pair = Pair("GPU-1")
    yield pair
    pair.views.close()


EVERY_DTYPE = [
    *(torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
]


def example(dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """33 × 7 elements of any bits that the dtype allows."""
    bits = torch.arange(33 * 7 * dtype.itemsize, device=device).remainder(251).to(torch.uint8)
    return (bits % 2 if dtype == torch.bool else bits).view(dtype).reshape(33, 7)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_arrives_bit_by_bit(pair: Pair, dtype: torch.dtype) -> None:
    """Also what is not contiguous, in the order of its elements."""
    tensor = example(dtype)
    for sent in (tensor, tensor.t(), tensor[::2, 1:]):
        seen = pair.sent(sent).view(dtype).reshape(sent.shape)
        assert torch.equal(bits_of(seen), bits_of(sent))


@pytest.mark.parametrize("producer_first", [True, False])
def test_a_block_is_held_by_its_producer_and_by_receivers(pair: Pair, producer_first: bool) -> None:
    """It is free when the last of both lets go, in whatever order; a part of a view holds all of it."""
    frame = pair.arena.copy_in(torch.arange(1000))
    assert frame is not None
    seen = pair.views.open("producer", frame.lend("receiver")).view(torch.int64)
    part = seen[10:20]
    if producer_first:
        del frame
    del seen
    gc.collect()
    assert not pair.views.take_released()
    assert pair.arena.num_blocks == 1
    assert part[0] == 10
    del part
    pair.give_back()
    if not producer_first:
        assert pair.arena.num_blocks == 1
        del frame
    assert pair.arena.num_blocks == 0
    assert pair.arena.free_bytes == pair.arena.size_bytes


def test_the_same_gpu_sees_the_memory_itself(pair: Pair) -> None:
    """Filled in place, sent without a copy: also a part of a tensor, as another dtype."""
    tensor = pair.arena.empty((64, 1024), torch.bfloat16)
    assert tensor is not None
    tensor[:] = torch.arange(1024)
    frame = pair.arena.copy_in(tensor[3:5].view(torch.int16))
    assert frame is not None
    assert pair.arena.num_blocks == 1
    seen = pair.views.open("producer", frame.lend("receiver")).view(torch.bfloat16)
    assert seen.numel() == 2 * 1024
    tensor[3, 7] = -1.0
    assert seen[7] == -1.0
    assert pair.receiver.copies == 0
    del tensor
    assert pair.arena.num_blocks == 1, "the frame keeps the block"
    assert pair.arena.frame_of(torch.zeros(10)) is None


def test_another_gpu_is_copied_once(far: Pair) -> None:
    """What the receiver holds is its own, so the block returns at once and may change."""
    tensor = far.arena.empty(1000, torch.uint8)
    assert tensor is not None
    tensor.fill_(7)
    frame = far.arena.copy_in(tensor)
    assert frame is not None
    seen = far.views.open("producer", frame.lend("receiver"))
    del frame
    far.give_back()
    tensor.fill_(8)
    assert torch.equal(seen, torch.full((1000,), 7, dtype=torch.uint8))
    assert far.receiver.copies == 1
    del tensor
    assert far.arena.num_blocks == 0


def test_the_receivers_stream_waits_for_the_producers(pair: Pair) -> None:
    """For what was given to it before the frame was made, and on the device: no thread waits."""
    pair.producer.main.work()
    frame = pair.arena.copy_in(torch.ones(10))
    assert frame is not None
    pair.producer.main.work()
    seen = pair.views.open("producer", frame.lend("receiver"))
    (event,) = pair.receiver.main.waits
    assert not event.query()
    pair.producer.main.done = 1
    assert event.query(), "what came after the frame is not waited for"
    del seen


@pytest.mark.parametrize("receiver_uuid", ["GPU-0", "GPU-1"])
def test_a_block_stays_while_the_receivers_device_reads_it(receiver_uuid: str) -> None:
    """Python let go, but work that was given to the stream may still look: the producer must not write there."""
    pair = Pair(receiver_uuid)
    stream = pair.receiver.main
    stream.work()
    seen = pair.sent(torch.ones(1000))
    del seen
    gc.collect()
    assert not pair.released.acquire(timeout=0.05)
    assert pair.arena.num_blocks == 1
    stream.finish()
    pair.give_back()
    assert pair.arena.num_blocks == 0
    pair.views.close()


def test_the_stream_of_the_thread_that_collects_counts_too(pair: Pair) -> None:
    """Received in the loop, used by a worker on a stream of its own."""
    side = FakeStream()
    held = [pair.sent(torch.ones(1000))]

    def use() -> None:
        pair.receiver.current.stream = side
        side.work()
        held.clear()

    worker = threading.Thread(target=use)
    worker.start()
    worker.join()
    assert not pair.released.acquire(timeout=0.05)
    side.finish()
    pair.give_back()
    assert pair.arena.num_blocks == 0


def test_a_peer_that_died_holds_nothing(pair: Pair) -> None:
    """What was lent to it, however often, is free; what others hold is not."""
    one, two = (pair.arena.copy_in(torch.ones(10)) for _ in range(2))
    assert one is not None
    assert two is not None
    for frame, peer in ((one, "dead"), (one, "dead"), (two, "dead"), (two, "alive")):
        frame.lend(peer)
    number = msgspec.msgpack.decode(two.lend("alive"), type=DevicePlace).block
    del one, two, frame
    pair.arena.peer_gone("dead")
    assert pair.arena.num_blocks == 1
    pair.arena.returned("stranger", [number])
    pair.arena.returned("alive", [number])
    assert pair.arena.num_blocks == 1, "it was lent twice"
    pair.arena.returned("alive", [number, number, 999])
    assert pair.arena.num_blocks == 0


def test_a_producer_that_died_is_unmapped_after_its_last_view(pair: Pair) -> None:
    """Once forgotten, and not before: the mapping is opened once, and closed once."""
    first, second = pair.sent(torch.ones(10)), pair.sent(torch.zeros(10))
    assert len(pair.receiver.opened) == 1
    pair.views.forget("producer")
    del first
    assert pair.released.acquire(timeout=DEADLINE_S)
    assert len(pair.receiver.opened) == 1
    assert torch.equal(second.view(torch.float32), torch.zeros(10))
    del second
    with pair.receiver.closing:
        assert pair.receiver.closing.wait_for(lambda: not pair.receiver.opened, DEADLINE_S)


def test_closing_waits_for_streams_and_unmaps(pair: Pair) -> None:
    """And an arena that nobody opened frees its pool; one that peers map does not."""
    pair.sent(torch.ones(10))
    pair.views.close()
    assert not pair.receiver.opened
    pair.arena.close()
    assert pair.producer.allocated, "a peer may map it"
    assert pair.arena.empty(10) is None
    alone = DeviceArena(FakeDevice(pair.node), size_bytes=1)
    tensor = alone.empty(10)
    assert tensor is not None
    del tensor
    alone.close()
    assert isinstance(alone.device, FakeDevice)
    assert not alone.device.allocated


def test_space_is_used_again_and_bounded(pair: Pair) -> None:
    """One allocation serves all; what it has no room for is not an error."""
    half = torch.zeros(GRANULE_BYTES, dtype=torch.uint8)
    for _ in range(5):
        assert pair.arena.copy_in(half) is not None
    held = [pair.arena.copy_in(half), pair.arena.copy_in(half)]
    assert all(held)
    assert pair.arena.copy_in(torch.zeros(1)) is None
    assert pair.arena.empty(10) is None
    held.pop()
    assert pair.arena.empty(10) is not None
    assert pair.arena.empty(0) is None
    assert len(pair.producer.allocated) == 1
    held.clear()
    small = [pair.arena.empty(1) for _ in range(MAX_BLOCKS)]
    assert all(tensor is not None for tensor in small)
    assert pair.arena.empty(1) is None, "each has an event"
    assert len(pair.node.events) == MAX_BLOCKS


def test_a_full_device_sends_through_the_host(caplog: pytest.LogCaptureFixture) -> None:
    """Said once; tried again when there may be room."""
    device = FakeDevice(FakeNode(), memory_bytes=0)
    arena = DeviceArena(device, size_bytes=1)
    assert arena.empty(10) is None
    assert arena.empty(10) is None
    assert caplog.text.count("no pool") == 1
    device.memory_bytes = GRANULE_BYTES
    assert arena.empty(10) is not None
    with pytest.raises(ValueError, match="0 bytes holds nothing"):
        DeviceArena(device, size_bytes=0)


def test_an_offer_tells_whether_a_gpu_can_be_reached(far: Pair) -> None:
    """Before anything is lent, so that the sender never has to take a frame back."""
    far.views.accept("producer", far.arena.offer())
    seen = far.sent(torch.ones(10))
    assert len(far.receiver.opened) == 1
    assert torch.equal(seen.view(torch.float32), torch.ones(10))
    far.node.apart.add("GPU-0")
    with pytest.raises(DeviceUnreachable, match=r"GPU-0 of other cannot be reached from GPU-1"):
        far.views.accept("other", far.arena.offer())
    with pytest.raises(BadFrame):
        far.views.accept("producer", b"\x90")


HANDLE = bytes(64)
PLACE = DevicePlace(Pool(HANDLE, "GPU-0", POOL_BYTES), 0, 10, 0, HANDLE)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"offset": POOL_BYTES - 9},
        {"nbytes": 0},
        {"nbytes": -5},
        {"nbytes": 1 << 63},
        {"block": -1},
        {"event": b"short"},
        {"event": bytes(65)},
    ],
)
def test_a_place_that_does_not_fit_is_a_bad_frame(pair: Pair, change: dict[str, object]) -> None:
    """No address is made of what does not lie in the pool."""
    frame = pair.arena.copy_in(torch.zeros(10))
    assert frame is not None
    good = msgspec.msgpack.decode(frame.lend("receiver"), type=DevicePlace)
    bad = msgspec.msgpack.encode(msgspec.structs.replace(good, **change))
    with pytest.raises(BadFrame):
        pair.views.open("producer", bad)


@pytest.mark.parametrize(
    "change",
    [
        {"handle": b""},
        {"handle": bytes(63)},
        {"uuid": ""},
        {"uuid": "x" * 1000},
        {"size": 1 << 40},
        {"size": 0},
        {"size": -1},
    ],
)
def test_a_pool_that_is_none_is_a_bad_frame(pair: Pair, change: dict[str, object]) -> None:
    """A sender's word for the size of its memory is not taken, nor are two different words."""
    frame = pair.arena.copy_in(torch.zeros(10))
    assert frame is not None
    good = msgspec.msgpack.decode(frame.lend("receiver"), type=DevicePlace)
    bad = msgspec.structs.replace(good, pool=msgspec.structs.replace(good.pool, **change))
    for sender in ("stranger", "producer"):
        with pytest.raises(BadFrame):
            pair.views.open(sender, msgspec.msgpack.encode(bad))
        pair.views.open("producer", msgspec.msgpack.encode(good))


def test_handles_that_name_nothing_are_unreachable(pair: Pair) -> None:
    """And bytes that are no place at all are a bad frame."""
    with pytest.raises(DeviceUnreachable):
        pair.views.open("producer", msgspec.msgpack.encode(PLACE))
    frame = pair.arena.copy_in(torch.zeros(10))
    assert frame is not None
    good = msgspec.msgpack.decode(frame.lend("receiver"), type=DevicePlace)
    with pytest.raises(DeviceUnreachable, match="events of producer"):
        pair.views.open(
            "producer", msgspec.msgpack.encode(msgspec.structs.replace(good, event=HANDLE))
        )
    for junk in (b"", b"\xc1", msgspec.msgpack.encode(DeviceOffer(PLACE.pool, HANDLE))):
        with pytest.raises(BadFrame):
            pair.views.open("producer", junk)


GIB = 1 << 30
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
# What the producer and the consumer see: the same GPU; two GPUs, each seen by one only; two, in opposite order.
VISIBLE = [
    pytest.param("0", "0", marks=needs_gpu, id="same"),
    pytest.param("0", "1", marks=needs_two_gpus, id="two"),
    pytest.param("0,1", "1,0", marks=needs_two_gpus, id="two-seen-by-both"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("producer_sees", "consumer_sees"), VISIBLE)
@pytest.mark.parametrize("segments", ["False", "True"])
def test_real_gpus_every_dtype(producer_sees: str, consumer_sees: str, segments: str) -> None:
    """Bit by bit, whatever torch's own allocator does; all blocks come back."""
    settings = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{segments}"}
    with Peers() as peers:
        producer = peers.start("producer", producer_sees, **settings)
        consumer = peers.start("consumer", consumer_sees, **settings)
        consumer.ask("accept", producer.ask("offer"))
        for seed, dtype in enumerate(EVERY_DTYPE):
            name = str(dtype).removeprefix("torch.")
            place, _ = producer.ask("make", name, 48000, seed, seed % 2 == 0)
            *_, device = consumer.ask("open", place)
            assert device == "cuda:0"
            assert consumer.ask("check", name, seed)
            consumer.ask("drop")
            producer.ask("drop")
            producer.ask("returned", consumer.ask("give_back"))
            assert producer.ask("facts")["blocks"] == 0


@pytest.mark.gpu
@needs_gpu
def test_real_gpu_a_gib_is_not_copied() -> None:
    """The consumer sees what the producer writes later, soon after it was sent, and allocates nothing."""
    with Peers() as peers:
        producer = peers.start("producer", "0", pool_bytes=GIB)
        consumer = peers.start("consumer", "0")
        consumer.ask("accept", producer.ask("offer"))
        place, begin = producer.ask("make", "uint8", GIB, 1, True)
        _, end, _ = consumer.ask("open", place)
        assert consumer.ask("facts")["allocated"] == 0
        assert end - begin < 0.02, "through the host it takes longer"
        assert consumer.ask("check", "uint8", 1)
        producer.ask("overwrite", 77)
        assert consumer.ask("first") == 77


@pytest.mark.gpu
@needs_two_gpus
def test_real_gpus_a_gib_is_copied_once() -> None:
    """The block returns though the consumer still looks at its copy."""
    with Peers() as peers:
        producer = peers.start("producer", "0", pool_bytes=GIB)
        consumer = peers.start("consumer", "1")
        consumer.ask("accept", producer.ask("offer"))
        for seed in range(3):
            place, _ = producer.ask("make", "uint8", GIB, seed, True)
            begin, end, _ = consumer.ask("open", place)
            producer.ask("drop")
            producer.ask("returned", consumer.ask("give_back"))
            assert producer.ask("facts")["blocks"] == 0
            assert consumer.ask("check", "uint8", seed)
        assert end - begin < 0.02, "through the host it takes longer"


@pytest.mark.gpu
@pytest.mark.parametrize(("producer_sees", "consumer_sees"), VISIBLE)
def test_real_gpus_a_killed_consumer_leaves_its_blocks(
    producer_sees: str, consumer_sees: str
) -> None:
    """Once the producer hears that it is gone; the next one finds the pool as it was."""
    with Peers() as peers:
        producer = peers.start("producer", producer_sees)
        for seed in range(2):
            consumer = peers.start("consumer", consumer_sees)
            place, _ = producer.ask("make", "float32", 1 << 20, seed, True)
            consumer.ask("open", place)
            assert consumer.ask("check", "float32", seed)
            producer.ask("drop")
            consumer.kill()
            assert producer.ask("facts")["blocks"] == 1
            producer.ask("gone", "consumer")
            assert producer.ask("facts")["blocks"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("producer_sees", "consumer_sees"), VISIBLE)
def test_real_gpus_a_killed_producer_leaves_the_consumer_whole(
    producer_sees: str, consumer_sees: str
) -> None:
    """It can compute, let go of what it saw, and work with the next producer of that name."""
    with Peers() as peers:
        consumer = peers.start("consumer", consumer_sees)
        for seed in range(2):
            producer = peers.start("producer", producer_sees)
            place, _ = producer.ask("make", "float32", 1 << 20, seed, True)
            consumer.ask("open", place)
            assert consumer.ask("check", "float32", seed)
            producer.kill()
            assert consumer.ask("facts")["computes"] == 1000
            consumer.ask("forget")
            consumer.ask("drop")
            consumer.ask("give_back")
