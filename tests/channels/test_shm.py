"""Shared memory: what is free, who holds it, and what two processes see of it."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from channel_peers import DEADLINE_S, Run, until
from forked import PIPE, Forked
from hypothesis import given
from hypothesis import strategies as st
from shm_reader import Take

from channels import payload
from channels.errors import BadFrame
from channels.socket_endpoint import SHARED_FRAME_BYTES, SocketEndpoint
from channels.tensors.allocator import ALIGNMENT, FreeList, aligned
from channels.tensors.shm import SEGMENT_BYTES, Place, SharedArena, SharedViews


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * ALIGNMENT)), max_size=60))
def test_blocks_never_overlap_and_all_come_back(history: list[tuple[bool, int]]) -> None:
    """Against a model that knows each page's owner."""
    free = FreeList(16 * ALIGNMENT)
    held: list[tuple[int, int]] = []
    for take, number in history:
        if take:
            offset = free.allocate(number)
            pages = {p for o, n in held for p in range(o, o + aligned(n), ALIGNMENT)}
            if offset is None:
                runs = "".join("x" if p * ALIGNMENT in pages else "." for p in range(16)).split("x")
                assert max(map(len, runs)) * ALIGNMENT < number
            else:
                assert pages.isdisjoint(range(offset, offset + aligned(number), ALIGNMENT))
                held.append((offset, number))
        elif held:
            free.free(*held.pop(number % len(held)))
        assert free.free_bytes == 16 * ALIGNMENT - sum(aligned(n) for _, n in held)
    for block in held:
        free.free(*block)
    assert free.empty
    assert free.allocate(16 * ALIGNMENT) == 0


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[SharedArena]:
    """An arena of at most two segments."""
    arena = SharedArena(tmp_path / "shared", "producer", limit_bytes=2 * SEGMENT_BYTES)
    yield arena
    arena.close()
    assert not list((tmp_path / "shared").glob("*"))


def views_of(arena: SharedArena) -> SharedViews:
    return SharedViews(arena.directory, lambda: None)


def test_a_block_is_held_by_its_producer_and_by_receivers(arena: SharedArena) -> None:
    """It is free when the last of both lets go, in whatever order."""
    views = views_of(arena)
    for producer_first in (True, False):
        frame = arena.copy_in(memoryview(np.arange(1000)))
        assert frame is not None
        seen = np.frombuffer(views.open("producer", frame.lend("reader")), np.int64)
        part = seen[10:20]
        np.testing.assert_array_equal(seen, np.arange(1000))
        if producer_first:
            del frame
        assert arena.num_blocks == 1
        del seen
        assert not views.take_released(), "a part of it is still seen"
        assert part[0] == 10
        del part
        arena.returned("reader", views.take_released()["producer"])
        if not producer_first:
            assert arena.num_blocks == 1
            del frame
        assert arena.num_blocks == 0


def test_what_was_written_in_place_is_not_copied(arena: SharedArena) -> None:
    """The receiver sees the producer's own pages: also a part of an array, as another dtype."""
    views = views_of(arena)
    array = arena.empty((64, 1024), np.float32)
    assert array is not None
    array[:] = np.arange(1024)
    frame = arena.copy_in(memoryview(array[3:5].view(np.uint8).reshape(-1)))
    assert frame is not None
    assert arena.num_blocks == 1
    seen = np.frombuffer(views.open("producer", frame.lend("reader")), np.float32)
    array[3, 7] = -1.0
    assert seen[7] == -1.0
    assert seen[8] == 8.0
    del array
    assert arena.num_blocks == 1, "the frame keeps the block"
    other = memoryview(np.zeros(10))
    assert arena.frame_of(other) is None


def test_a_peer_that_died_holds_nothing(arena: SharedArena) -> None:
    """What was lent to it, however often, is free; what others hold is not."""
    one, two = (arena.copy_in(memoryview(np.ones(10))) for _ in range(2))
    assert one is not None
    assert two is not None
    for frame, peer in ((one, "dead"), (one, "dead"), (two, "dead"), (two, "alive")):
        frame.lend(peer)
    number = msgspec.msgpack.decode(two.lend("alive"), type=Place).block
    del one, two, frame
    arena.peer_gone("dead")
    assert arena.num_blocks == 1
    arena.returned("stranger", [number])
    arena.returned("alive", [number])
    assert arena.num_blocks == 1, "it was lent twice"
    arena.returned("alive", [number, number, 999])
    assert arena.num_blocks == 0


def test_space_is_used_again_and_bounded(arena: SharedArena) -> None:
    """The same pages serve one after another; beyond the limit there is no frame."""
    data = memoryview(np.zeros(SEGMENT_BYTES // 8))
    for _ in range(5):
        assert arena.copy_in(data) is not None
        assert arena.size_bytes == SEGMENT_BYTES
    held = [arena.copy_in(data), arena.copy_in(data)]
    assert all(held)
    assert arena.size_bytes == 2 * SEGMENT_BYTES
    assert arena.copy_in(memoryview(b"x")) is None
    assert arena.empty(10) is None
    held.pop()
    assert arena.empty(10) is not None
    assert arena.empty(0) is None


def test_a_tmpfs_that_is_nearly_full_is_left_alone(
    arena: SharedArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touching one page too many would kill the process."""
    monkeypatch.setattr("channels.tensors.shm.SPARE_FRACTION", 1.0)
    assert arena.copy_in(memoryview(np.zeros(10))) is None


def test_a_restarted_producer_removes_what_it_left(tmp_path: Path) -> None:
    """And its readers see its new memory, not the one they mapped before."""
    killed = SharedArena(tmp_path, "env-0")
    neighbour = SharedArena(tmp_path, "env-0.1")
    frames = [a.copy_in(memoryview(np.full(100, 1.0))) for a in (killed, neighbour)]
    views = views_of(killed)
    old = views.open("env-0", frames[0].lend("reader"))  # type: ignore[union-attr]
    restarted = SharedArena(tmp_path, "env-0")
    frame = restarted.copy_in(memoryview(np.full(100, 2.0)))
    assert frame is not None
    new = views.open("env-0", frame.lend("reader"))
    assert np.frombuffer(old)[0] == 1.0
    assert np.frombuffer(new)[0] == 2.0
    assert len(list(tmp_path.glob("*"))) == 2, "that of another name stays"
    views.forget("env-0")
    assert not views._mappings
    for arena in (neighbour, restarted):
        arena.close()


@pytest.mark.parametrize(
    "place",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(Place("../../etc/passwd", 0, 1, 0)),
        msgspec.msgpack.encode(Place("passwd", 0, 1, 0)),
        msgspec.msgpack.encode(Place("missing.arena", 0, 1, 0)),
        msgspec.msgpack.encode(Place("empty.arena", 0, 1, 0)),
        msgspec.msgpack.encode(Place("link.arena", 0, 1, 0)),
        msgspec.msgpack.encode(Place("sparse.arena", -1, 1, 0)),
        msgspec.msgpack.encode(Place("sparse.arena", SEGMENT_BYTES - 1, 2, 0)),
        msgspec.msgpack.encode(Place("sparse.arena", 0, 0, 0)),
    ],
)
def test_a_place_that_is_none_is_a_bad_frame(arena: SharedArena, place: bytes) -> None:
    """Nothing outside the arenas is opened, and nothing outside their memory read."""
    arena.directory.mkdir()
    (arena.directory / "empty.arena").touch()
    with (arena.directory / "sparse.arena").open("wb") as file:
        file.truncate(SEGMENT_BYTES)
    (arena.directory / "link.arena").symlink_to("/etc/passwd")
    with pytest.raises(BadFrame):
        views_of(arena).open("producer", place)
    for name in ("empty.arena", "link.arena", "sparse.arena"):
        (arena.directory / name).unlink()


class Reader:
    """The reading process."""

    def __init__(self, sockets: Path, peer_address: str) -> None:
        script = Path(__file__).with_name("shm_reader.py")
        self.address = f"ipc://{sockets}/reader"
        words = (self.address, peer_address, str(sockets / "shared"))
        self.process = Forked(script, *words, stdin=PIPE, stdout=PIPE)

    async def says(self, command: str = "") -> str:
        """Its next line, after a command if any."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if command:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()


@pytest.fixture
def reader() -> Iterator[Callable[[Path, str], Reader]]:
    """Starts a reading process, and ends it."""
    started: list[Reader] = []

    def start(sockets: Path, peer_address: str) -> Reader:
        started.append(Reader(sockets, peer_address))
        return started[-1]

    yield start
    for each in started:
        for pipe in (each.process.stdin, each.process.stdout):
            assert pipe is not None
            pipe.close()
        each.process.wait(timeout=DEADLINE_S)


def test_two_processes(run: Run, sockets: Path, reader: Callable[[Path, str], Reader]) -> None:
    """A view outlives the producer's interest and the next item; its block comes back when it is dropped."""

    async def main() -> None:
        writer = SocketEndpoint("writer", f"ipc://{sockets}/writer", shared_dir=sockets / "shared")
        other = reader(sockets, writer.address)
        assert await other.says() == "ready"
        writer.connect("reader", other.address)
        arena = writer._arena
        assert arena is not None
        ones = np.ones(SHARED_FRAME_BYTES, np.uint8)
        writer.send("reader", Take(), ones)
        assert await other.says() == str(ones.size)
        assert arena.num_blocks == 1
        ones[:] = 2  # it was copied in
        assert await other.says("again") == str(ones.size)
        in_place = writer.empty(SHARED_FRAME_BYTES, np.uint8)
        in_place[:] = 3
        writer.send("reader", Take(), {"array": in_place}["array"])
        assert await other.says() == str(3 * in_place.size)
        await until(lambda: arena.num_blocks == 1)  # the first was dropped for the second
        assert await other.says("drop") == "dropped"
        del in_place
        gc.collect()
        await until(lambda: arena.num_blocks == 0)
        small = np.ones(SHARED_FRAME_BYTES - 1, np.uint8)
        writer.send("reader", Take(), small)
        assert await other.says() == str(small.size)
        assert arena.num_blocks == 0
        writer.close()
        assert not list((sockets / "shared").glob("writer*"))
        assert await other.says("again") == str(small.size)

    run(main)


def test_a_killed_reader_leaves_its_blocks(
    run: Run, sockets: Path, reader: Callable[[Path, str], Reader]
) -> None:
    """Once the producer hears that it is gone."""

    async def main() -> None:
        writer = SocketEndpoint("writer", f"ipc://{sockets}/writer", shared_dir=sockets / "shared")
        other = reader(sockets, writer.address)
        await other.says()
        writer.connect("reader", other.address)
        arena = writer._arena
        assert arena is not None
        writer.send("reader", Take(), np.ones(SHARED_FRAME_BYTES, np.uint8))
        await other.says()
        other.process.kill()
        other.process.wait()
        assert arena.num_blocks == 1
        writer.disconnect("reader")
        assert arena.num_blocks == 0
        writer.close()

    run(main)


def test_packed_once_sent_to_many(run: Run, sockets: Path) -> None:
    """A payload that goes to another peer is not copied again; a peer across a network gets the bytes."""

    async def main() -> None:
        writer = SocketEndpoint("writer", f"ipc://{sockets}/w", shared_dir=sockets / "shared")
        near = SocketEndpoint("near", f"ipc://{sockets}/n", shared_dir=sockets / "shared")
        far = SocketEndpoint("far", "tcp://127.0.0.1:*")
        arrived: asyncio.Queue[np.ndarray] = asyncio.Queue()
        for peer in (near, far):
            peer.on_message = lambda sender, message, tree: arrived.put_nowait(tree["x"])
            writer.connect(peer.name, peer.address)
            peer.connect("writer", writer.address)
        packed = writer.pack({"x": np.arange(SHARED_FRAME_BYTES)})
        assert isinstance(packed, payload.Encoded)
        arena = writer._arena
        assert arena is not None
        for peer in (near, far):
            writer.send(peer.name, Take(), packed)
            array = await arrived.get()
            np.testing.assert_array_equal(array, np.arange(SHARED_FRAME_BYTES))
            assert arena.num_blocks == 1
        del packed, array
        await until(lambda: arena.num_blocks == 0)
        for endpoint in (writer, near, far):
            endpoint.close()

    run(main)
