"""Device memory between the processes of a node: pools that producers fill and receivers look into.

    arena = DeviceArena(CudaDevice())                        # the producer's
    frame = arena.copy_in(tensor)                            # or: tensor = arena.empty(shape, dtype), filled in place
    views = DeviceViews(CudaDevice(), on_released)           # the receiver's
    tensor = views.open(sender, frame.lend(receiver))

A pool is one allocation of fixed size, made when first needed and recycled until the process ends. It lies outside
torch's caching allocator, so it makes no difference whether that one's segments are expandable, and a handle shows a
peer nothing but what was put there for peers. No tensor of a model is ever exported.

Where a view lies: on the same GPU it is the producer's memory itself, nothing is copied. Memory of another GPU is
copied to the receiver's, over NVLink or PCIe, and its block is returned with the end of the copy: what a receiver
holds is always on its own device, and a tensor that is read twice crosses the link once. GPUs are known by UUID, so
both ends may see different CUDA_VISIBLE_DEVICES, and neither need see the other's. A receiver that cannot reach a GPU
raises DeviceUnreachable from `accept`, which is asked once before anything is lent; to such a peer tensors go another
way.

Order of work: a frame is ready when what its producer's current stream was given before `copy_in` is done; the
receiver's current stream waits for it at `open`, on the device, no thread does. Who fills or reads on further streams
orders these with the current one, as with any tensor of torch.

Lifetime: as in `channels.tensors.shm`. A block is free again when its producer has dropped it and every receiver it was
lent to has returned it or is gone. A receiver returns it when the last tensor on it was collected and the device has
finished what was given, until then, to the stream it was opened on and to the current stream of the thread that
collected it. The memory of a producer that died stays mapped until the views on it are collected.
"""

import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from channels.errors import BadFrame
from channels.tensors.allocator import FreeList
from channels.tensors.blocks import Block, LendingArena
from channels.tensors.devices import HANDLE_BYTES, Device, DeviceEvent
from channels.tensors.errors import DeviceError, DeviceUnreachable
from channels.tensors.tensor_frame import bytes_of

log = logging.getLogger(__name__)

POOL_BYTES = 1 << 30
GRANULE_BYTES = (
    2 << 20
)  # below it the driver gives out parts of a block, and a handle names the whole
MAX_BLOCKS = 512  # each has an event that other processes see; a process may have about 1,000
MAX_UUID = 64


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """An exported allocation."""

    handle: bytes
    uuid: str
    size: int


class DeviceOffer(msgspec.Struct, frozen=True, array_like=True):
    """Producer to receiver, before anything is lent: my pool, and one of the events that will come with frames."""

    pool: Pool
    event: bytes


class DevicePlace(msgspec.Struct, frozen=True, array_like=True):
    """Where a frame lies, for a receiver. block: what it names when it returns it. event: ready from then on."""

    pool: Pool
    offset: int
    nbytes: int
    block: int
    event: bytes


class _Block(Block):
    """A part of the pool that is in use. event: ready from then on."""

    __slots__ = ("event",)

    def __init__(self, number: int, offset: int, nbytes: int, event: DeviceEvent) -> None:
        super().__init__(number, offset, nbytes)
        self.event = event


class DeviceFrame:
    """Contiguous bytes in a pool that are to be sent. Holds its block for as long as it lives."""

    __slots__ = ("_arena", "_block", "_start", "_tensor", "nbytes")

    def __init__(
        self, arena: "DeviceArena", block: _Block, tensor: torch.Tensor, start: int
    ) -> None:
        self._arena, self._block, self._tensor, self._start = arena, block, tensor, start
        self.nbytes = tensor.nbytes
        block.event.record(arena.device.stream())

    def lend(self, peer: str) -> bytes:
        """What a peer of this node is sent instead of the bytes; it holds the block until it returns it."""
        block = self._block
        block.lent[peer] += 1
        place = DevicePlace(
            self._arena.pool,
            block.offset + self._start,
            self.nbytes,
            block.number,
            block.event.ipc_handle(),
        )
        return msgspec.msgpack.encode(place)


class DeviceArena(LendingArena[_Block]):
    """The memory of one GPU that one process shares. Any thread may allocate; lending belongs to the loop.

    size_bytes: of the pool; what does not fit travels another way
    """

    def __init__(self, device: Device, *, size_bytes: int = POOL_BYTES) -> None:
        if size_bytes <= 0:
            raise ValueError(
                f"a pool of {size_bytes} bytes holds nothing: give its size, or make no arena"
            )
        super().__init__()
        self.device = device
        self.size_bytes = -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES
        self._free = FreeList(self.size_bytes)
        self._address: int | None = None
        self._pool: Pool | None = None
        self._by_offset: dict[int, _Block] = {}
        self._events: list[DeviceEvent] = []
        self._refused = False  # by the device, and said so
        self._closed = False

    @property
    def pool(self) -> Pool:
        """The pool as peers open it."""
        with self._lock:
            if self._pool is None:
                address = self._allocated()
                self._pool = Pool(self.device.export(address), self.device.uuid, self.size_bytes)
            return self._pool

    @property
    def free_bytes(self) -> int:
        """Bytes of the pool that nobody uses."""
        with self._lock:
            self._sweep()
            return self._free.free_bytes

    def offer(self) -> bytes:
        """What a peer's `DeviceViews.accept` needs to say whether it can reach this arena.

        Raises DeviceError when the device has no room for the pool.
        """
        pool = self.pool
        with self._lock:
            if not self._events:
                self._events.append(self.device.shared_event())
            event = self._events[-1]
        return msgspec.msgpack.encode(DeviceOffer(pool, event.ipc_handle()))

    def empty(
        self, shape: Sequence[int] | int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor | None:
        """A tensor to be filled in place and then sent without a copy; None when there is no room."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        taken = self._take(dtype.itemsize * torch.Size(shape).numel())
        return None if taken is None else taken[1].view(dtype).reshape(shape)

    def copy_in(self, tensor: torch.Tensor) -> DeviceFrame | None:
        """A frame with a tensor's bytes: in place where they lie in this arena, else copied by the current stream.

        None when there is no room, and for tensors of other devices.
        """
        if tensor.device != self.device.device:
            return None
        data = bytes_of(tensor)
        placed = self.frame_of(data)
        if placed is not None:
            return placed
        taken = self._take(data.nbytes)
        if taken is None:
            return None
        block, space = taken
        space.copy_(data, non_blocking=True)
        return DeviceFrame(self, block, space, 0)

    def frame_of(self, tensor: torch.Tensor) -> DeviceFrame | None:
        """The frame of a contiguous tensor that lies in a block of this arena; None for others."""
        if self._address is None or tensor.device != self.device.device or not tensor.nbytes:
            return None
        storage = tensor.untyped_storage().data_ptr()
        block = self._by_offset.get(storage - self._address)
        if block is None or not tensor.is_contiguous():
            return None
        return DeviceFrame(self, block, bytes_of(tensor), tensor.data_ptr() - storage)

    def close(self) -> None:
        """Give out nothing more. The pool is freed where nobody can see it; otherwise it goes with the process."""
        with self._lock:
            self._sweep()
            self._closed = True
            # To free what a peer still maps is undefined, whether it looks at it or not.
            if self._address is not None and self._pool is None and not self._blocks:
                self.device.free(self._address)
                self._address = None

    def _take(self, nbytes: int) -> tuple[_Block, torch.Tensor] | None:
        if nbytes == 0:
            return None
        with self._lock:
            self._sweep()
            if self._closed or len(self._blocks) >= MAX_BLOCKS:
                return None
            try:
                address = self._allocated()
                event = self._events.pop() if self._events else self.device.shared_event()
            except DeviceError as error:
                # Not for good: what fills the device now may be gone by the next frame.
                log.log(
                    logging.DEBUG if self._refused else logging.WARNING,
                    "tensors leave through the host: no pool of %d bytes: %s",
                    self.size_bytes,
                    error,
                )
                self._refused = True
                return None
            offset = self._free.allocate(nbytes)
            if offset is None:
                self._events.append(event)
                return None
            block = _Block(self._number(), offset, nbytes, event)
            self._blocks[block.number] = self._by_offset[offset] = block
        collected = functools.partial(self._disowned.append, block.number)
        return block, self.device.view(address + offset, nbytes, collected)

    def _allocated(self) -> int:
        if self._address is None:
            if self._closed:
                raise DeviceError(f"the pool on {self.device.device} is closed")
            self._address = self.device.allocate(self.size_bytes)
        return self._address

    def _release(self, block: _Block) -> None:
        del self._by_offset[block.offset]
        self._events.append(block.event)
        self._free.free(block.offset, block.nbytes)


class _Mapping:
    """A pool of another process, opened here. Closed when it is forgotten and its last view returned."""

    __slots__ = ("address", "forgotten", "pool", "views")

    def __init__(self, pool: Pool, address: int) -> None:
        self.pool, self.address = pool, address
        self.views = 0
        self.forgotten = False


class _Return(msgspec.Struct):
    """A block that nobody here looks at any more, once these streams have done what they were given."""

    sender: str
    block: int
    mapping: Any
    streams: tuple[Any, ...]


class DeviceViews:
    """What a process sees, from one GPU of its own, of the arenas of others. Opening and forgetting belong to the loop.

    on_released: called with nothing, from another thread, when there is something to return
    """

    def __init__(self, device: Device, on_released: Callable[[], None]) -> None:
        self.device = device
        self._on_released = on_released
        self._mappings: dict[str, dict[bytes, _Mapping]] = {}
        self._events: dict[str, dict[bytes, DeviceEvent]] = {}
        self._released: deque[tuple[str, int]] = deque()
        self._lock = threading.Lock()
        # To the thread that waits for streams. A SimpleQueue, because finalizers put into it.
        self._returns: queue.SimpleQueue[_Return | _Mapping | None] = queue.SimpleQueue()
        self._waiter: threading.Thread | None = None
        self._closed = False

    def accept(self, sender: str, offer: bytes | memoryview) -> None:
        """Map a sender's pool. Raises DeviceUnreachable when frames in it cannot be opened here, BadFrame
        for bytes that are no offer."""
        try:
            what = msgspec.msgpack.decode(offer, type=DeviceOffer)
        except msgspec.DecodeError as error:
            raise BadFrame(f"not an offer of device memory: {error}") from error
        self._mapping(sender, what.pool)
        self._event(sender, what.event)

    def open(self, sender: str, place: bytes | memoryview) -> torch.Tensor:
        """The bytes that a sender described, uint8, on this GPU. The current stream waits until they are ready.

        Raises BadFrame for a description that does not fit the memory it names, DeviceUnreachable for
        memory that this GPU cannot reach.
        """
        try:
            where = msgspec.msgpack.decode(place, type=DevicePlace)
        except msgspec.DecodeError as error:
            raise BadFrame(f"not a place in device memory: {error}") from error
        mapping = self._mapping(sender, where.pool)
        end = where.offset + where.nbytes
        if where.offset < 0 or where.nbytes <= 0 or end > where.pool.size or where.block < 0:
            raise BadFrame(
                f"{where.nbytes} bytes at {where.offset} as block {where.block} do not fit "
                f"a pool of {where.pool.size} bytes"
            )
        event = self._event(sender, where.event)
        stream = self.device.stream()
        event.wait(stream)
        address = mapping.address + where.offset
        if where.pool.uuid == self.device.uuid:
            self._count(mapping, +1)
            collected = functools.partial(self._collected, sender, where.block, mapping, stream)
            return self.device.view(address, where.nbytes, collected)
        try:
            tensor = torch.empty(where.nbytes, dtype=torch.uint8, device=self.device.device)
        except torch.OutOfMemoryError as error:
            raise DeviceUnreachable(
                f"{self.device.device} has no room for {where.nbytes} bytes from {where.pool.uuid}"
            ) from error
        self._count(mapping, +1)
        try:
            self.device.copy(tensor, address)
        finally:
            self._returns.put(_Return(sender, where.block, mapping, (stream,)))
        return tensor

    def take_released(self) -> dict[str, list[int]]:
        """By sender, the blocks that neither Python nor the device looks at any more, since the last call."""
        released: dict[str, list[int]] = {}
        while self._released:
            sender, block = self._released.popleft()
            released.setdefault(sender, []).append(block)
        return released

    def forget(self, sender: str) -> None:
        """Unmap the pools of a process that is gone, each as soon as nothing refers to it."""
        self._events.pop(sender, None)
        for mapping in self._mappings.pop(sender, {}).values():
            self._forget(mapping)

    def close(self) -> None:
        """Forget all senders and end the thread, after the work that streams have with what was dropped."""
        for sender in list(self._mappings):
            self.forget(sender)
        self._closed = True
        if self._waiter is not None:
            self._returns.put(None)
            self._waiter.join()

    def _collected(self, sender: str, block: int, mapping: _Mapping, stream: Any) -> None:
        # In whatever thread the last tensor was collected, so neither locks nor calls to the driver.
        streams = {stream, self.device.stream()}
        self._returns.put(_Return(sender, block, mapping, tuple(streams)))

    def _mapping(self, sender: str, pool: Pool) -> _Mapping:
        known = self._mappings.setdefault(sender, {})
        mapping = known.get(pool.handle)
        if mapping is not None:
            if mapping.pool != pool:
                raise BadFrame(
                    f"the pool of {sender} was {mapping.pool.size} bytes on {mapping.pool.uuid}, "
                    f"not {pool.size} on {pool.uuid}"
                )
            return mapping
        if len(pool.handle) != HANDLE_BYTES or not 0 < len(pool.uuid) <= MAX_UUID:
            raise BadFrame(
                f"a handle of {len(pool.handle)} bytes on {pool.uuid!r:.80} names no device memory"
            )
        self._start()
        try:
            address, size = self.device.open(pool.handle)
        except DeviceError as error:
            raise DeviceUnreachable(
                f"GPU {pool.uuid} of {sender} cannot be reached from {self.device.uuid} ({error}): "
                "its tensors have to travel over NCCL or the host"
            ) from error
        mapping = _Mapping(pool, address)
        if not 0 < pool.size <= size:
            self._forget(mapping)
            raise BadFrame(
                f"{sender} says {pool.size} bytes of an allocation that has {size} bytes"
            )
        known[pool.handle] = mapping
        return mapping

    def _event(self, sender: str, handle: bytes) -> DeviceEvent:
        known = self._events.setdefault(sender, {})
        event = known.get(handle)
        if event is not None:
            return event
        if len(handle) != HANDLE_BYTES:
            raise BadFrame(f"a handle of {len(handle)} bytes names no event")
        if len(known) > MAX_BLOCKS:
            raise BadFrame(f"{sender} uses more than {MAX_BLOCKS} events")
        try:
            event = known[handle] = self.device.open_event(handle)
        except DeviceError as error:
            raise DeviceUnreachable(
                f"the events of {sender} cannot be opened on {self.device.uuid} ({error}): "
                "its tensors have to travel over NCCL or the host"
            ) from error
        return event

    def _count(self, mapping: _Mapping, views: int = 0, *, forget: bool = False) -> bool:
        """Count the views on a mapping. Returns whether it is now to be closed, which one caller only is told."""
        with self._lock:
            mapping.views += views
            mapping.forgotten |= forget
            return mapping.forgotten and not mapping.views

    def _forget(self, mapping: _Mapping) -> None:
        if self._count(mapping, forget=True):
            self._returns.put(mapping)

    def _start(self) -> None:
        if self._closed:
            raise DeviceError("these views are closed")
        if self._waiter is None:
            self._waiter = threading.Thread(
                target=self._wait_for_streams, name="device-returns", daemon=True
            )
            self._waiter.start()

    def _wait_for_streams(self) -> None:
        event = self.device.event()
        while (item := self._returns.get()) is not None:
            try:
                if isinstance(item, _Mapping):
                    self.device.close(item.address)
                    continue
                for stream in item.streams:
                    event.record(stream)
                    event.synchronize()
                if self._count(item.mapping, -1):
                    self.device.close(item.mapping.address)
            except (RuntimeError, DeviceError) as error:
                # torch's word for a GPU that failed for good: nothing on it is ever done, or used, again.
                log.warning("memory of a peer is not given back on %s: %s", self.device.uuid, error)
                continue
            self._released.append((item.sender, item.block))
            self._on_released()
