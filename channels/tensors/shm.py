"""Shared memory between the processes of a node: arenas that producers fill and receivers look into.

    arena = SharedArena(directory, "job-env-0.1")            # the producer's
    frame = arena.copy_in(view)                              # or: array = arena.empty(shape, dtype), filled in place
    views = SharedViews(directory, on_released)              # the receiver's
    buffer = views.open(frame.place())

An arena is a few files on a tmpfs, made on demand, kept and re-used: pages that were touched before take a copy at the
speed of memcpy, fresh ones several times slower. Files lie in a directory of the job, which flowd removes with the job,
however its actors died; mappings outlive their names.

Lifetime: a block is free again when its producer has dropped it (the frame, and every array on it) and every receiver
it was lent to has returned it or is gone. A receiver returns it when the last array on the block is collected, so
views never change under their reader, whether the item was acknowledged or not. They are the producer's memory all the
same, so who wants to write makes a copy first.
"""

import glob
import mmap
import os
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from channels.errors import BadFrame
from channels.tensors.allocator import FreeList, aligned
from channels.tensors.blocks import Block, LendingArena

SEGMENT_BYTES = 64 << 20  # the first; each further one doubles what there is
LIMIT_BYTES = 4 << 30
SUFFIX = ".arena"
SPARE_FRACTION = 0.1  # of the tmpfs, left to others


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a frame lies, for a receiver. block: what it names when it returns it."""

    file: str
    offset: int
    nbytes: int
    block: int


class BlockArray(np.ndarray[Any, Any]):
    """An array that owns a block, made on the mapping itself.

    numpy lets a view skip to the base of its base where that is an ordinary array; here it is not.
    """

    # `keeps` is set on the one that owns, and not on what is made of it.
    keeps: Any = None

    def __array_finalize__(self, of: Any) -> None:
        self.keeps = None


class _Block(Block):
    """A part of a segment that is in use."""

    __slots__ = ("segment",)

    def __init__(self, number: int, segment: "_Segment", offset: int, nbytes: int) -> None:
        super().__init__(number, offset, nbytes)
        self.segment = segment


class _Segment:
    """One file of an arena, mapped."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self.free = FreeList(size_bytes)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            self.memory = mmap.mmap(descriptor, size_bytes)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def drop(self) -> None:
        """Remove the name. The mapping goes with the last array on it."""
        self.path.unlink(missing_ok=True)


class ArenaFrame:
    """Contiguous bytes in an arena that are to be sent. Holds its block for as long as it lives."""

    __slots__ = ("_arena", "_array", "_block", "_start", "nbytes")

    def __init__(
        self, arena: "SharedArena", block: _Block, array: np.ndarray[Any, Any], start: int
    ) -> None:
        self._arena, self._block, self._array, self._start = arena, block, array, start
        self.nbytes = array.nbytes

    @property
    def view(self) -> memoryview:
        """The bytes themselves, for receivers that cannot look into the arena."""
        return memoryview(self._array)  # type: ignore[arg-type]  # numpy declares no buffer for Python 3.11

    def lend(self, peer: str) -> bytes:
        """What a peer of this node is sent instead of the bytes; it holds the block until it returns it."""
        self._block.lent[peer] += 1
        segment = self._block.segment
        place = Place(
            segment.path.name, self._block.offset + self._start, self.nbytes, self._block.number
        )
        return msgspec.msgpack.encode(place)


class SharedArena(LendingArena[_Block]):
    """The memory that one process shares. Any thread may allocate; lending belongs to the loop.

    directory: on a tmpfs, common to the processes of a job; made when first needed    name: unique there
    limit_bytes: of all segments together; beyond it frames travel through the socket
    """

    def __init__(self, directory: Path, name: str, *, limit_bytes: int = LIMIT_BYTES) -> None:
        super().__init__()
        self.directory, self.name, self.limit_bytes = directory, name, limit_bytes
        self._segments: list[_Segment] = []
        self._next_segment = 0
        self._token = secrets.token_hex(4)  # a reader never takes our file for one it mapped before
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Memory taken by all segments."""
        return sum(segment.free.size_bytes for segment in self._segments)

    def empty(
        self, shape: Sequence[int] | int, dtype: Any = np.float32
    ) -> np.ndarray[Any, Any] | None:
        """An array to be filled in place and then sent without a copy; None when there is no room."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        taken = self._take(dtype.itemsize * int(np.prod(shape, dtype=np.int64)))
        if taken is None:
            return None
        return np.ndarray(shape, dtype, taken[1])

    def copy_in(self, data: memoryview) -> ArenaFrame | None:
        """A frame with these bytes: in place where they lie in this arena, else copied; None without room."""
        placed = self.frame_of(data)
        if placed is not None:
            return placed
        taken = self._take(data.nbytes)
        if taken is None:
            return None
        block, array = taken
        np.copyto(array, np.frombuffer(data, np.uint8))
        return ArenaFrame(self, block, array, 0)

    def frame_of(self, data: memoryview) -> ArenaFrame | None:
        """The frame of contiguous bytes that lie in a block of this arena; None for others."""
        owner: Any = data.obj
        while owner is not None and getattr(owner, "keeps", None) is None:
            owner = getattr(owner, "base", None)
        block = None if owner is None else owner.keeps
        if not isinstance(block, _Block) or self._blocks.get(block.number) is not block:
            return None
        array = np.frombuffer(data, np.uint8)
        start = array.ctypes.data - owner.ctypes.data
        assert 0 <= start <= block.nbytes - array.nbytes
        return ArenaFrame(self, block, array, start)

    def close(self) -> None:
        """Remove the files; arrays that are still held stay valid."""
        with self._lock:
            self._closed = True
            for segment in self._segments:
                segment.drop()
            self._segments.clear()

    def _take(self, nbytes: int) -> tuple[_Block, BlockArray] | None:
        if nbytes == 0:
            return None
        with self._lock:
            self._sweep()
            found = self._find(nbytes)
            if found is None:
                return None
            segment, offset = found
            block = _Block(self._number(), segment, offset, nbytes)
            self._blocks[block.number] = block
        array = BlockArray(nbytes, np.uint8, segment.memory, offset)
        array.keeps = block
        weakref.finalize(array, self._disowned.append, block.number).atexit = False
        return block, array

    def _find(self, nbytes: int) -> tuple[_Segment, int] | None:
        if self._closed:
            return None
        for segment in self._segments:
            offset = segment.free.allocate(nbytes)
            if offset is not None:
                return segment, offset
        segment_bytes = max(aligned(nbytes), SEGMENT_BYTES, self.size_bytes)
        if self.size_bytes + segment_bytes > self.limit_bytes:
            segment_bytes = aligned(nbytes)
        if self.size_bytes + segment_bytes > self.limit_bytes or not self._room(segment_bytes):
            return None
        if not self._next_segment:
            self._delete_predecessors()
        path = self.directory / f"{self.name}.{self._token}.{self._next_segment}{SUFFIX}"
        self._next_segment += 1
        segment = _Segment(path, segment_bytes)
        self._segments.append(segment)
        offset = segment.free.allocate(nbytes)
        assert offset is not None
        return segment, offset

    def _delete_predecessors(self) -> None:
        """What a process of our name left when it was killed. Who maps it keeps it until done."""
        for path in self.directory.glob(f"{glob.escape(self.name)}.*.*{SUFFIX}"):
            if _arena_of(path.name) == self.name:
                path.unlink(missing_ok=True)

    def _room(self, nbytes: int) -> bool:
        # A tmpfs hands pages out when they are touched, and kills who touches one too many.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = os.statvfs(self.directory)
        spare = SPARE_FRACTION * status.f_blocks * status.f_frsize
        return status.f_bavail * status.f_frsize - nbytes >= spare

    def _release(self, block: _Block) -> None:
        block.segment.free.free(block.offset, block.nbytes)


class SharedViews:
    """What a process sees of the arenas of others.

    on_released: called with nothing, from any thread, when there is something to return
    """

    def __init__(self, directory: Path, on_released: Callable[[], None]) -> None:
        self.directory = directory
        self._on_released = on_released
        self._mappings: dict[str, mmap.mmap] = {}
        self._released: deque[tuple[str, int]] = deque()

    def open(self, sender: str, place: bytes | memoryview) -> memoryview:
        """The bytes that a sender described. They stay as they are for as long as anything refers to them.

        Raises BadFrame for a description that does not fit the memory it names.
        """
        try:
            where = msgspec.msgpack.decode(place, type=Place)
        except msgspec.DecodeError as error:
            raise BadFrame(f"not a place in shared memory: {error}") from error
        memory = self._mapping(where.file)
        if where.offset < 0 or where.nbytes <= 0 or where.offset + where.nbytes > len(memory):
            raise BadFrame(f"{where} does not fit {where.file} of {len(memory)} bytes")
        array = BlockArray(where.nbytes, np.uint8, memory, where.offset)
        array.keeps = self
        weakref.finalize(array, self._release, sender, where.block).atexit = False
        return memoryview(array)  # type: ignore[arg-type]

    def take_released(self) -> dict[str, list[int]]:
        """By sender, the blocks that nobody here looks at any more, since the last call."""
        released: dict[str, list[int]] = {}
        while self._released:
            sender, block = self._released.popleft()
            released.setdefault(sender, []).append(block)
        return released

    def forget(self, name: str) -> None:
        """Unmap the arenas of a process that is gone, as far as nothing refers to them."""
        for file in [file for file in self._mappings if _arena_of(file) == name]:
            del self._mappings[file]

    def _release(self, sender: str, block: int) -> None:
        self._released.append((sender, block))
        self._on_released()

    def _mapping(self, file: str) -> mmap.mmap:
        known = self._mappings.get(file)
        if known is not None:
            return known
        if "/" in file or not file.endswith(SUFFIX):
            raise BadFrame(f'"{file}" is not the name of an arena')
        try:
            descriptor = os.open(self.directory / file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise BadFrame(f"the arena {file} cannot be opened: {error.strerror}") from error
        try:
            # Not private: a page that its reader wrote to would no longer follow what the producer puts there next.
            memory = mmap.mmap(descriptor, 0)
        except (ValueError, OSError) as error:
            raise BadFrame(f"the arena {file} cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        self._mappings[file] = memory
        return memory


def _arena_of(file: str) -> str:
    """The name of the arena that a file "NAME.TOKEN.NUMBER.arena" belongs to."""
    return file.rsplit(".", 3)[0]
