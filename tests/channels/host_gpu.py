"""A GPU made of files, and NCCL over Unix sockets: what several processes see, on a machine without one.

What it cannot show is what a driver does: its work is done at once, and a peer that died is silent for ever.
"""

import hashlib
import mmap
import os
import queue
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_fakes import DEADLINE_S, FakeDevice, FakeEvent, FakeNode

from channels.tensors.devices import HANDLE_BYTES, DeviceEvent
from channels.tensors.errors import DeviceError
from channels.tensors.nccl_link import SENDER, UNIQUE_ID_BYTES


class HostGpu(FakeDevice):
    """See Device. directory: the same for all processes of a node    uuid: the same for one GPU"""

    def __init__(self, directory: Path, uuid: str) -> None:
        super().__init__(FakeNode(), uuid)
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.names: dict[int, bytes] = {}

    def nccl(self) -> "SocketLibrary":  # type: ignore[override]
        return SocketLibrary(self.directory)

    def allocate(self, nbytes: int) -> int:
        name = os.urandom(HANDLE_BYTES // 2).hex().encode()
        array = _mapped(self.directory / name.decode(), nbytes)
        self.allocated[array.ctypes.data] = array
        self.names[array.ctypes.data] = name
        return array.ctypes.data

    def export(self, address: int) -> bytes:
        return self.names[address]

    def open(self, handle: bytes) -> tuple[int, int]:
        path = self.directory / handle.decode()
        if not path.exists():
            raise DeviceError("invalid handle")
        array = _mapped(path, path.stat().st_size)
        self.node.memory[handle] = (self.uuid, array)
        self.opened.append(array.ctypes.data)
        return array.ctypes.data, array.nbytes

    def shared_event(self) -> FakeEvent:
        return FakeEvent(self, os.urandom(HANDLE_BYTES))

    def open_event(self, handle: bytes) -> FakeEvent:
        return FakeEvent(self, handle)


def _mapped(path: Path, nbytes: int) -> Any:
    with open(path, "a+b") as file:
        if os.fstat(file.fileno()).st_size < nbytes:
            file.truncate(nbytes)
        return np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8)


class SocketLibrary:
    """See Library."""

    device = torch.device("cpu")
    version = 22809

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def unique_id(self) -> bytes:
        return os.urandom(UNIQUE_ID_BYTES)

    def connect(self, unique_id: bytes, rank: int) -> "SocketCommunicator":
        name = hashlib.sha256(unique_id).hexdigest()[:16]
        return SocketCommunicator(str(self.directory / name), rank)

    def now(self) -> DeviceEvent:
        return _Done()

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)


class _Done(threading.Event):
    """The event of a transfer."""

    def synchronize(self) -> None:
        assert self.wait(DEADLINE_S)

    def record(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return self.is_set()

    def ipc_handle(self) -> bytes:
        raise AssertionError


class SocketCommunicator:
    """See Communicator. A thread plays the stream."""

    def __init__(self, path: str, rank: int) -> None:
        self.path, self.rank = path, rank
        self.aborted = threading.Event()
        self.given: queue.SimpleQueue[tuple[torch.Tensor, _Done] | None] = queue.SimpleQueue()
        self.last = _Done()
        self.peer: socket.socket | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        if rank == SENDER:
            self.socket.bind(path)
            self.socket.listen()
        self.stream = threading.Thread(target=self._carry_out, daemon=True)

    def settled(self) -> bool:
        if self.aborted.is_set():
            raise DeviceError("the communicator was aborted")
        if self.peer is None:
            try:
                if self.rank == SENDER:
                    self.peer = self.socket.accept()[0]
                    os.unlink(self.path)
                else:
                    self.socket.connect(self.path)
                    self.peer = self.socket
            except (BlockingIOError, FileNotFoundError, ConnectionRefusedError):
                return False
            self.peer.setblocking(True)
            self.stream.start()
        return True

    def send(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        self._give(tensor)

    def receive(self, tensor: torch.Tensor) -> None:
        self._give(tensor)

    def mark(self) -> DeviceEvent:
        return self.last  # type: ignore[return-value]

    def abort(self) -> None:
        self.aborted.set()
        self.given.put(None)
        if self.peer is not None:
            try:
                self.peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other end was faster
            self.stream.join()
            self.peer.close()
        self.socket.close()

    def _give(self, tensor: torch.Tensor) -> None:
        self.last = _Done()
        self.given.put((tensor, self.last))

    def _carry_out(self) -> None:
        assert self.peer is not None
        while (work := self.given.get()) is not None:
            tensor, done = work
            data = memoryview(tensor.numpy())  # type: ignore[arg-type]
            try:
                if self.rank == SENDER:
                    self.peer.sendall(data)
                while self.rank != SENDER and data:
                    count = self.peer.recv_into(data)
                    if not count:
                        raise ConnectionResetError
                    data = data[count:]
            except OSError:  # silence
                assert self.aborted.wait(DEADLINE_S)
            done.set()
        while not self.given.empty():
            rest = self.given.get()
            if rest is not None:
                rest[1].set()
