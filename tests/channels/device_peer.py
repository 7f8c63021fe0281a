"""Processes with GPUs of their own, for the tests on real ones: each answers one request after another on a pipe.

with Peers() as peers:
    producer = peers.start("producer", visible="0")
    place = producer.ask("make", "float32", 1000)
"""

import multiprocessing
import os
import threading
import time
from concurrent.futures import Future
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any
from unittest import mock

import torch

ANSWER_S = 60.0


def example(dtype: torch.dtype, nbytes: int, device: torch.device, seed: int) -> torch.Tensor:
    """Bits that the dtype allows, the same on every GPU."""
    generator = torch.Generator(device).manual_seed(seed)
    bits = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device, generator=generator)
    return (bits & 1 if dtype == torch.bool else bits).view(dtype)


def same_bits(tensor: torch.Tensor, dtype: str, seed: int) -> bool:
    """Whether bytes that were received are those of an example."""
    wanted = example(getattr(torch, dtype), tensor.nbytes, tensor.device, seed)
    return torch.equal(wanted.view(torch.uint8), tensor)


class _Process:
    """What the requests work on; a method each. Imports that look for GPUs happen in the process only."""

    def __init__(self, name: str, pool_bytes: int) -> None:
        from channels.tensors.cuda_ipc import DeviceArena, DeviceViews
        from channels.tensors.device_messages import LinkClosed
        from channels.tensors.devices import CudaDevice
        from channels.tensors.nccl import NcclLinks

        self.gpu = CudaDevice(0)
        self.arena = DeviceArena(self.gpu, size_bytes=pool_bytes)
        self.released = threading.Semaphore(0)
        self.views = DeviceViews(self.gpu, self.released.release)
        self.posted: list[tuple[str, LinkClosed]] = []
        self.links = NcclLinks(
            name, self.gpu.nccl(), lambda peer, message: self.posted.append((peer, message))
        )
        self.held: dict[str, torch.Tensor] = {}
        self.pending: dict[str, Future[torch.Tensor]] = {}

    def facts(self) -> dict[str, Any]:
        return {
            "uuid": self.gpu.uuid,
            "allocated": torch.cuda.memory_allocated(),
            "blocks": self.arena.num_blocks,
            "computes": torch.ones(1000, device=self.gpu.device).sum().item(),
        }

    def offer(self) -> bytes:
        return self.arena.offer()

    def accept(self, offer: bytes) -> None:
        self.views.accept("producer", offer)

    def make(self, dtype: str, nbytes: int, seed: int, in_place: bool) -> tuple[bytes, float]:
        """Lend an example; says when its content was there."""
        tensor = example(getattr(torch, dtype), nbytes, self.gpu.device, seed)
        if in_place:
            space = self.arena.empty(tensor.shape, tensor.dtype)
            assert space is not None
            space.copy_(tensor)
            tensor = space
        torch.cuda.synchronize()
        begin = time.monotonic()
        frame = self.arena.copy_in(tensor)
        assert frame is not None
        self.held["made"] = tensor
        return frame.lend("consumer"), begin

    def overwrite(self, value: int) -> None:
        self.held["made"].view(torch.uint8).fill_(value)
        torch.cuda.synchronize()

    def open(self, place: bytes) -> tuple[float, float, str]:
        """Look at it; says when that began, when it could be used, and where it is."""
        begin = time.monotonic()
        tensor = self.views.open("producer", place)
        torch.cuda.current_stream().synchronize()
        self.held["seen"] = tensor
        return begin, time.monotonic(), str(tensor.device)

    def check(self, dtype: str, seed: int) -> bool:
        return same_bits(self.held["seen"], dtype, seed)

    def first(self) -> int:
        return int(self.held["seen"][0])

    def drop(self) -> None:
        self.held.clear()

    def give_back(self) -> list[int]:
        """The blocks to be returned, as soon as there are any."""
        assert self.released.acquire(timeout=ANSWER_S)
        return self.views.take_released()["producer"]

    def returned(self, blocks: list[int]) -> None:
        self.arena.returned("consumer", blocks)

    def forget(self) -> None:
        self.views.forget("producer")

    def gone(self, peer: str) -> None:
        self.arena.peer_gone(peer)
        self.links.peer_gone(peer)

    def send(self, peer: str, name: str, dtype: str, nbytes: int, seed: int) -> bytes:
        tensor = example(getattr(torch, dtype), nbytes, self.gpu.device, seed)
        place, self.pending[name] = self.links.send(peer, tensor)
        return place

    def receive(self, sender: str, name: str, place: bytes) -> None:
        self.pending[name] = self.links.receive(sender, place)

    def outcome(self, name: str) -> str:
        """ "done", or why not."""
        try:
            self.held["seen"] = self.pending.pop(name).result(timeout=ANSWER_S)
        except Exception as error:  # what it is, is for the test to judge
            return f"{type(error).__name__}: {error}"
        return "done"


def _serve(connection: Connection, name: str, pool_bytes: int) -> None:
    process = _Process(name, pool_bytes)
    connection.send(None)
    while True:
        try:
            request, *arguments = connection.recv()
        except EOFError:
            process.views.close()
            process.links.close()
            return
        try:
            connection.send(getattr(process, request)(*arguments))
        except Exception as error:  # to whoever asked
            connection.send(RuntimeError(f"{request}: {type(error).__name__}: {error}"))


class Peer:
    """The other end of a process."""

    def __init__(self, name: str, visible: str, pool_bytes: int, **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, name, pool_bytes), name=name, daemon=True
        )
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible, **environment}):
            self.process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it says next."""
        assert self.connection.poll(ANSWER_S), "no answer"
        answer = self.connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(self, request: str, *arguments: Any) -> None:
        """Ask without waiting for the answer."""
        self.connection.send((request, *arguments))

    def ask(self, request: str, *arguments: Any) -> Any:
        self.tell(request, *arguments)
        return self.answer()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """Let it end on its own."""
        self.connection.close()
        self.process.join(ANSWER_S)
        self.process.kill()


class Peers:
    """Starts processes, and ends them."""

    def __init__(self) -> None:
        self._started: list[Peer] = []

    def start(
        self, name: str, visible: str, *, pool_bytes: int = 1 << 24, **environment: str
    ) -> Peer:
        """A process that sees these GPUs, and uses the first."""
        peer = Peer(name, visible, pool_bytes, **environment)
        self._started.append(peer)
        peer.answer()
        return peer

    def __enter__(self) -> "Peers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for peer in self._started:
            peer.stop()
