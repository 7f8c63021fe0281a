"""GPUs over host memory, and the node they are in: everything but the driver, for tests without a GPU.

Streams do their work when a test says so. Several `FakeDevice`s of one uuid are that GPU as several processes see it.
"""

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from channels.tensors.devices import HANDLE_BYTES, DeviceEvent
from channels.tensors.errors import DeviceError
from channels.tensors.nccl_link import UNIQUE_ID_BYTES

DEADLINE_S = 20.0


class FakeStream:
    """Work that was given, and how much of it is done: all of it at once unless `held`."""

    def __init__(self) -> None:
        self.given = self.done = 0
        self.waits: list[DeviceEvent] = []
        self.changed = threading.Condition()

    def work(self) -> None:
        """Give it something that is not done until `finish`."""
        self.given += 1

    def finish(self) -> None:
        """All work is done."""
        with self.changed:
            self.done = self.given
            self.changed.notify_all()


class FakeEvent:
    """See DeviceEvent."""

    def __init__(self, device: "FakeDevice", handle: bytes = b"") -> None:
        self._device, self._handle = device, handle
        self.stream: FakeStream | None = None
        self.point = 0

    def record(self, stream: Any = None) -> None:
        self.stream = stream or self._device.stream()
        assert self.stream is not None
        self.point = self.stream.given

    def wait(self, stream: Any = None) -> None:
        (stream or self._device.stream()).waits.append(self)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.point

    def synchronize(self) -> None:
        if self.stream is not None:
            with self.stream.changed:
                assert self.stream.changed.wait_for(self.query, DEADLINE_S)

    def ipc_handle(self) -> bytes:
        return self._handle


class FakeNode:
    """What is exported on a node: memory and events by handle, and which GPUs reach each other."""

    def __init__(self) -> None:
        self.memory: dict[bytes, tuple[str, np.ndarray[Any, Any]]] = {}
        self.events: dict[bytes, FakeEvent] = {}
        self.apart: set[str] = set()  # uuids that others do not reach
        self.fabric = FakeFabric()
        self._count = 0

    def handle(self) -> bytes:
        """A new one."""
        self._count += 1
        return self._count.to_bytes(HANDLE_BYTES, "little")


class _Array(np.ndarray[Any, Any]):
    """Something to hang a finalizer on."""


class FakeDevice:
    """See Device. allocated, opened: addresses in use    memory_bytes: beyond it, nothing is allocated"""

    def __init__(self, node: FakeNode, uuid: str = "GPU-0", memory_bytes: int = 1 << 30) -> None:
        self.node, self.uuid, self.memory_bytes = node, uuid, memory_bytes
        self.device = torch.device("cpu")
        self.allocated: dict[int, np.ndarray[Any, Any]] = {}
        self.opened: list[int] = []
        self.copies = 0
        self.main = FakeStream()
        self.current = threading.local()
        self.closing = threading.Condition()
        self.library: FakeLibrary | None = FakeLibrary(self)

    def nccl(self) -> "FakeLibrary":
        if self.library is None:
            raise DeviceError("NCCL cannot be loaded")
        return self.library

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.memory_bytes:
            raise DeviceError("out of memory")
        array = np.zeros(nbytes, np.uint8)
        self.allocated[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: int) -> None:
        del self.allocated[address]

    def export(self, address: int) -> bytes:
        handle = self.node.handle()
        self.node.memory[handle] = (self.uuid, self.allocated[address])
        return handle

    def open(self, handle: bytes) -> tuple[int, int]:
        if handle not in self.node.memory:
            raise DeviceError("invalid handle")
        uuid, array = self.node.memory[handle]
        if uuid != self.uuid and uuid in self.node.apart:
            raise DeviceError("peer access unsupported")
        self.opened.append(array.ctypes.data)
        return array.ctypes.data, array.nbytes

    def close(self, address: int) -> None:
        with self.closing:
            self.opened.remove(address)
            self.closing.notify_all()

    def view(self, address: int, nbytes: int, collected: Callable[[], None]) -> torch.Tensor:
        array = self._at(address, nbytes).view(_Array)
        weakref.finalize(array, collected).atexit = False
        return torch.from_numpy(array)

    def copy(self, to: torch.Tensor, address: int) -> None:
        self.copies += 1
        to.numpy()[:] = self._at(address, to.nbytes)

    def stream(self) -> FakeStream:
        stream: FakeStream = getattr(self.current, "stream", self.main)
        return stream

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def shared_event(self) -> FakeEvent:
        event = FakeEvent(self, self.node.handle())
        self.node.events[event.ipc_handle()] = event
        return event

    def open_event(self, handle: bytes) -> FakeEvent:
        if handle not in self.node.events:
            raise DeviceError("invalid handle")
        return self.node.events[handle]

    def _at(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        for array in (*self.allocated.values(), *(a for _, a in self.node.memory.values())):
            start = address - array.ctypes.data
            if 0 <= start and start + nbytes <= array.nbytes:
                return array[start : start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are nobody's")


class FakePair:
    """What two ranks with one unique id have in common: transfers that wait for their other half."""

    def __init__(self) -> None:
        self.ranks: list[FakeCommunicator] = []
        self.waiting: tuple[deque[_Half], deque[_Half]] = (deque(), deque())
        self.broken = ""
        self.stuck = False  # nothing arrives any more, and nobody is told
        self.lock = threading.Lock()

    def match(self) -> None:
        """Carry out what both halves are there of."""
        with self.lock:
            sends, receives = self.waiting
            while sends and receives and not self.stuck:
                source, target = sends.popleft(), receives.popleft()
                target.tensor.copy_(source.tensor.contiguous().reshape(-1).view(torch.uint8))
                source.over.set()
                target.over.set()


class _Half:
    """One end of a transfer, and the event of its end."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.over = threading.Event()

    def synchronize(self) -> None:
        assert self.over.wait(DEADLINE_S)


class FakeCommunicator:
    """See Communicator."""

    def __init__(self, pair: FakePair, rank: int) -> None:
        self.pair, self.rank = pair, rank
        self.aborted = threading.Event()
        self.given: list[_Half] = []
        self.after: list[DeviceEvent] = []
        with pair.lock:
            assert rank not in [other.rank for other in pair.ranks], "a unique id serves once"
            pair.ranks.append(self)

    def settled(self) -> bool:
        if self.aborted.is_set():
            raise DeviceError("the communicator was aborted")
        if self.pair.broken:
            raise DeviceError(self.pair.broken)
        return len(self.pair.ranks) == 2

    def send(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        self.after.append(after)
        self._transfer(tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        self._transfer(tensor)

    def mark(self) -> Any:
        return self.given[-1]

    def abort(self) -> None:
        self.aborted.set()
        for half in self.given:  # the device goes on, without the rest
            half.over.set()

    def _transfer(self, tensor: torch.Tensor) -> None:
        assert self.settled()
        half = _Half(tensor)
        self.given.append(half)
        self.pair.waiting[self.rank].append(half)
        self.pair.match()


class FakeFabric:
    """What connects the processes."""

    def __init__(self) -> None:
        self.pairs: dict[bytes, FakePair] = {}

    def pair(self, unique_id: bytes) -> FakePair:
        """What both ranks meet in."""
        return self.pairs.setdefault(unique_id, FakePair())

    @property
    def communicators(self) -> list[FakeCommunicator]:
        """All that were ever made."""
        return [rank for pair in self.pairs.values() for rank in pair.ranks]


class FakeLibrary:
    """See Library. refuses: what `connect` says    memory_bytes: of one tensor at most"""

    def __init__(self, gpu: FakeDevice) -> None:
        self.gpu, self.device = gpu, gpu.device
        self.version = 22809
        self.refuses = ""
        self.memory_bytes = 1 << 40

    def unique_id(self) -> bytes:
        return os.urandom(UNIQUE_ID_BYTES)

    def connect(self, unique_id: bytes, rank: int) -> FakeCommunicator:
        if self.refuses:
            raise DeviceError(self.refuses)
        return FakeCommunicator(self.gpu.node.fabric.pair(unique_id), rank)

    def now(self) -> FakeEvent:
        event = self.gpu.event()
        event.record()
        return event

    def empty(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.memory_bytes:
            raise torch.OutOfMemoryError(f"{nbytes} bytes")
        return torch.empty(nbytes, dtype=torch.uint8)
