"""A receiver of device weights in a process of its own, and a GPU for it that needs none.

    python weights_device_peer.py SOCKET DEVICE

DEVICE: "cuda:N", or a directory: then memory is files there, so that real processes share it on any machine.
Takes buckets from the socket and acknowledges each; says after each what it holds, and the checksum of a whole version.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from channels.messages import decode, encode
from channels.tensors.devices import HANDLE_BYTES, CudaDevice, Device, DeviceEvent
from channels.tensors.errors import DeviceError
from channels.weights.delta import checksum
from channels.weights.device import DeviceReceiver, WeightsBucket


class _NoEvent:
    """Of a device whose work is done at once."""

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def ipc_handle(self) -> bytes:
        return bytes(HANDLE_BYTES)


class FileDevice:
    """See Device: its memory is files that other processes map."""

    def __init__(self, directory: Path, uuid: str) -> None:
        self.directory, self.uuid = directory, uuid
        self.device = torch.device("cpu")
        self.maps: dict[int, mmap.mmap] = {}

    def allocate(self, nbytes: int) -> int:
        with (self.directory / str(len(self.maps))).open("w+b") as file:
            file.truncate(nbytes)
            return self._map(file.fileno())

    def free(self, address: int) -> None:
        del self.maps[address]

    def export(self, address: int) -> bytes:
        return str(list(self.maps).index(address)).encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> tuple[int, int]:
        try:
            with (self.directory / handle.rstrip(b"\0").decode()).open("r+b") as file:
                address = self._map(file.fileno())
        except OSError as error:
            raise DeviceError("invalid handle") from error
        return address, len(self.maps[address])

    def close(self, address: int) -> None:
        del self.maps[address]

    def view(self, address: int, nbytes: int, collected: Callable[[], None]) -> torch.Tensor:
        return torch.frombuffer(self.maps[address], dtype=torch.uint8, count=nbytes)

    def copy(self, to: torch.Tensor, address: int) -> None:
        ctypes.memmove(to.data_ptr(), address, to.nbytes)

    def stream(self) -> None:
        return None

    def event(self) -> DeviceEvent:
        return _NoEvent()

    def shared_event(self) -> DeviceEvent:
        return _NoEvent()

    def open_event(self, handle: bytes) -> DeviceEvent:
        return _NoEvent()

    def _map(self, file: int) -> int:
        mapping = mmap.mmap(file, 0)
        address = int(np.frombuffer(mapping, np.uint8).ctypes.data)
        self.maps[address] = mapping
        return address


def make_device(name: str, uuid: str = "GPU-peer") -> Device:
    """Of a name as on the command line."""
    if name.startswith("cuda:"):
        ordinal = int(name.partition(":")[2])
        torch.cuda.set_device(ordinal)
        return CudaDevice(ordinal)
    return FileDevice(Path(name), uuid)


def make_state(device: torch.device, seed: int | None = None) -> dict[str, torch.Tensor]:
    """Tensors larger and smaller than a bucket, of several dtypes; zeros, or random."""
    shapes = {
        "embedding": ((500, 64), torch.bfloat16),
        "norm": ((64,), torch.bfloat16),
        "scale": ((), torch.float32),
        "empty": ((0, 3), torch.float16),
        "mask": ((77,), torch.bool),
        "head": ((33, 64), torch.float32),
    }
    generator = torch.Generator().manual_seed(seed or 0)
    state = {}
    for name, (shape, dtype) in shapes.items():
        drawn = torch.randn(shape, generator=generator) if seed is not None else torch.zeros(shape)
        state[name] = (drawn > 0 if dtype == torch.bool else drawn.to(dtype)).to(device)
    return state


def serve(connection: Connection, device: Device) -> None:
    """Until the other end closes."""
    state = make_state(device.device)
    receiver = DeviceReceiver(device, state)
    while True:
        try:
            bucket = decode(connection.recv_bytes())
        except EOFError:
            receiver.close()
            return
        assert isinstance(bucket, WeightsBucket)
        complete = receiver.take(bucket)
        connection.send_bytes(encode(bucket.taken()))
        connection.send((receiver.held, checksum(state) if complete else ""))


if __name__ == "__main__":
    with Client(sys.argv[1]) as peer:
        serve(peer, make_device(sys.argv[2]))
