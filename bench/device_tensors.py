"""How fast do device tensors reach another process, against torch's own copies and collectives?

    python -m bench.device_tensors --json

Processes see one GPU each. Every figure is the median over rounds, and each round runs a kind and what it is compared
with in turn. On one GPU:
  `ipc_same_gpu_us`          from the call that lends 1 GiB, filled in place, to a view that the consumer can use
  `ipc_same_gpu_copy_in_us`  the same for a tensor that lies elsewhere on the GPU, and is copied once
On two:
  `ipc_two_gpus_gib_per_s`   1 GiB from the lending call to the end of the copy on the other GPU;
  `ipc_two_gpus_copy_gib_per_s`, counted from where the consumer has the message
  `peer_copy_gib_per_s`      `Tensor.copy_` between the two in one process
  `nccl_gib_per_s`           WINDOW tensors of 1 GiB through a link, from the first call to the last arrival;
  `nccl_one_gib_per_s`, one alone
  `nccl_channel_gib_per_s`   the same through a channel between two endpoints, from the first `put` to the last view;
  `nccl_channel_one_gib_per_s`, one alone; `nccl_channel_acked_gib_per_s` and `nccl_channel_acked_one_gib_per_s`, to the
  end of the last `call`, when the producer has the acknowledgement
  `dist_gib_per_s`           the same with `dist.send` and `dist.recv`; `dist_one_gib_per_s`
  `nccl_dead_peer_ms`        from `kill -9` of the receiver to the error at the sender, as soon as it is told
"""

import argparse
import asyncio
import importlib.metadata
import json
import multiprocessing
import os
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
import uvloop

from bench.local import MachineLoad, surroundings
from channels.errors import PeerLost

GIB = 1 << 30
WINDOW = 8
WARM_ROUNDS = 2
ANSWER_S = 120.0
TRIES = 100  # of a first tensor, until the peer's answer has come


class Channel:
    """One end of a channel between two nodes, as far as its endpoints know, on a loop that runs when it is asked."""

    def __init__(self, name: str, peer: str, gpu: Any, other: Connection) -> None:
        from channels.channel import ChannelRouter
        from channels.socket_endpoint import SocketEndpoint

        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self.other, self.peer = other, peer

        async def connect() -> tuple[SocketEndpoint, ChannelRouter]:
            endpoint = SocketEndpoint(name, "tcp://127.0.0.1:*", device=lambda: gpu)
            other.send(endpoint.address)
            endpoint.connect(peer, other.recv())
            return endpoint, ChannelRouter(endpoint)

        self.endpoint, self.router = self.runner.run(connect())


class ProducerChannel(Channel):
    """Puts."""

    def begin(self, small: torch.Tensor) -> None:
        """Have device tensors go over NCCL. Raises RuntimeError when they do not."""

        async def begin() -> None:
            self.producer = self.router.producer(
                "tensors", bound=2 * WINDOW, bound_bytes=2 * WINDOW * GIB
            )
            self.producer.add_consumer(self.peer)
            for _ in range(TRIES):
                await self.producer.call(small)
                if self.endpoint.transport(self.peer).name == "nccl":
                    break
            await self.producer.call(None)

        self.runner.run(begin())
        name, why = self.endpoint.transport(self.peer)
        if name != "nccl":
            raise RuntimeError(f"the channel goes by {name}: {why}")

    def send(self, tensor: torch.Tensor, count: int) -> tuple[float, float]:
        """Seconds until so many calls have been received, and answered."""

        async def send() -> tuple[float, float]:
            begin = time.monotonic()
            await asyncio.gather(*(self.producer.call(tensor) for _ in range(count)))
            return begin, time.monotonic()

        begin, acked = self.runner.run(send())
        end: float = self.other.recv()
        return end - begin, acked - begin


class ConsumerChannel(Channel):
    """Gets."""

    def begin(self) -> None:
        """Answer `ProducerChannel.begin`."""

        async def begin() -> None:
            self.consumer = self.router.consumer("tensors", capacity=WINDOW)
            self.consumer.add_producer(self.peer)
            ready = False
            while not ready:
                item = await self.consumer.get()
                ready = item.payload is None
                item.ack()
            await self._told()

        self.runner.run(begin())

    def receive(self, count: int) -> list[torch.Tensor]:
        """Answer one `send`."""

        async def receive() -> tuple[list[torch.Tensor], float]:
            tensors = []
            for _ in range(count):
                item = await self.consumer.get()
                tensors.append(item.payload)
                item.ack()
            end = time.monotonic()
            await self._told()
            return tensors, end

        tensors, end = self.runner.run(receive())
        self.other.send(end)
        return tensors

    async def _told(self) -> None:
        """What was acknowledged leaves at the end of the loop's turn."""
        for _ in range(3):
            await asyncio.sleep(0)


class Producer:
    """Has the tensor. Talks to the consumer itself, so that no third process stands in the way of a measurement."""

    def __init__(self, port: int, other: Connection) -> None:
        from channels.tensors.cuda_ipc import DeviceArena
        from channels.tensors.devices import CudaDevice
        from channels.tensors.nccl import NcclLinks

        self.gpu, self.port, self.other = CudaDevice(0), port, other
        self.arena = DeviceArena(self.gpu, size_bytes=2 * GIB)
        in_place = self.arena.empty(GIB, torch.uint8)
        assert in_place is not None
        self.in_place = in_place
        self.elsewhere = torch.full((GIB,), 7, dtype=torch.uint8, device=self.gpu.device)
        in_place.fill_(7)
        other.send(self.arena.offer())
        self.failed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.links = NcclLinks(
            "producer", self.gpu.nccl(), lambda _, message: self.failed.put(message)
        )

    def lend(self, copy: bool) -> tuple[float, float]:
        """Seconds until the consumer could use it, from our call and from its own."""
        torch.cuda.synchronize()
        begin = time.monotonic()
        frame = self.arena.copy_in(self.elsewhere if copy else self.in_place)
        assert frame is not None
        self.other.send_bytes(frame.lend("consumer"))
        del frame
        began, end, blocks = self.other.recv()
        self.arena.returned("consumer", blocks)
        return end - begin, end - began

    def join(self) -> None:
        """The group of torch that NCCL links are compared with."""
        _join(self.port, 0)

    def links_send(self, count: int) -> float:
        """Seconds until so many tensors have left and arrived."""
        begin = time.monotonic()
        sent = []
        for _ in range(count):
            place, left = self.links.send("consumer", self.in_place)
            self.other.send_bytes(place)
            sent.append(left)
        for left in sent:
            left.result(ANSWER_S)
        end: float = self.other.recv()
        return end - begin

    def open_channel(self) -> None:
        """Between endpoints, see `Channel`."""
        self.channel = ProducerChannel("producer", "consumer", self.gpu, self.other)
        self.channel.begin(self.elsewhere[: 1 << 20])

    def channel_send(self, count: int) -> tuple[float, float]:
        """Seconds until so many tensors were received, and acknowledged."""
        return self.channel.send(self.elsewhere, count)

    def dist_send(self, count: int) -> float:
        """The same by torch."""
        begin = time.monotonic()
        for _ in range(count):
            dist.send(self.in_place, 1)
        torch.cuda.synchronize()
        end: float = self.other.recv()
        return end - begin

    def send_into_nothing(self) -> float:
        """Of a transfer that the consumer does not ask for: milliseconds from its death to our error."""
        _, sent = self.links.send("consumer", self.in_place)
        killed = threading.Event()
        times: list[float] = []
        sent.add_done_callback(lambda _: (times.append(time.monotonic()), killed.set()))
        self.other.send_bytes(b"die")
        try:
            self.other.recv()
        except (EOFError, ConnectionResetError):  # the kernel closes what it had, as a pidfd tells
            began = time.monotonic()
        self.links.peer_gone("consumer")
        assert killed.wait(ANSWER_S)
        assert isinstance(sent.exception(), PeerLost)
        torch.ones(1, device=self.gpu.device).sum().item()
        return (times[0] - began) * 1e3


class Consumer:
    """Is where the tensor goes."""

    def __init__(self, port: int, other: Connection) -> None:
        from channels.tensors.cuda_ipc import DeviceViews
        from channels.tensors.devices import CudaDevice
        from channels.tensors.nccl import NcclLinks

        self.gpu, self.port, self.other = CudaDevice(0), port, other
        self.released = threading.Semaphore(0)
        self.views = DeviceViews(self.gpu, self.released.release)
        self.views.accept("producer", other.recv())
        self.links = NcclLinks("consumer", self.gpu.nccl(), lambda *_: None)

    def open(self) -> bool:
        """Answer one `lend`. Whether what came is what was sent."""
        place = self.other.recv_bytes()
        began = time.monotonic()
        tensor = self.views.open("producer", place)
        torch.cuda.current_stream().synchronize()
        end = time.monotonic()
        right = _right(tensor)
        del tensor
        assert self.released.acquire(timeout=ANSWER_S)
        self.other.send((began, end, self.views.take_released()["producer"]))
        return right

    def join(self) -> None:
        """See Producer."""
        _join(self.port, 1)

    def links_receive(self, count: int) -> bool:
        """Answer one `links_send`."""
        arriving: list[Future[torch.Tensor]] = [
            self.links.receive("producer", self.other.recv_bytes()) for _ in range(count)
        ]
        tensors = [each.result(ANSWER_S) for each in arriving]
        self.other.send(time.monotonic())
        return all(map(_right, tensors))

    def open_channel(self) -> None:
        """See Producer."""
        self.channel = ConsumerChannel("consumer", "producer", self.gpu, self.other)
        self.channel.begin()

    def channel_receive(self, count: int) -> bool:
        """Answer one `channel_send`."""
        return all(map(_right, self.channel.receive(count)))

    def dist_receive(self, count: int) -> bool:
        """Answer one `dist_send`."""
        tensors = [
            torch.empty(GIB, dtype=torch.uint8, device=self.gpu.device) for _ in range(count)
        ]
        for tensor in tensors:
            dist.recv(tensor, 0)
        torch.cuda.synchronize()
        self.other.send(time.monotonic())
        return all(map(_right, tensors))

    def die(self) -> None:
        """When the producer says so."""
        self.other.recv_bytes()
        os.kill(os.getpid(), 9)


class Copier:
    """Sees both GPUs, and copies from one to the other as torch does."""

    def __init__(self, port: int, other: Connection) -> None:
        self.source = torch.full((GIB,), 7, dtype=torch.uint8, device="cuda:0")
        self.target = torch.empty_like(self.source, device="cuda:1")

    def copy(self) -> float:
        """Seconds for one."""
        torch.cuda.synchronize(1)
        begin = time.monotonic()
        self.target.copy_(self.source)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        return time.monotonic() - begin


def _right(tensor: torch.Tensor) -> bool:
    return bool((tensor[:: 1 << 20] == 7).all().item()) and int(tensor[-1]) == 7


def _join(port: int, rank: int) -> None:
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        device_id=torch.device("cuda", 0),
    )


def _play(
    role: Callable[[int, Connection], Any], requests: Connection, port: int, other: Connection
) -> None:
    player = role(port, other)
    requests.send(None)
    while True:
        try:
            name, *arguments = requests.recv()
        except EOFError:
            return
        requests.send(getattr(player, name)(*arguments))


class Process:
    """One of the roles, in a process that sees some GPUs."""

    def __init__(
        self,
        role: Callable[[int, Connection], Any],
        visible: str,
        port: int,
        other: Connection,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.requests, theirs = context.Pipe()
        self.process = context.Process(target=_play, args=(role, theirs, port, other), daemon=True)
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": visible}):
            self.process.start()
        theirs.close()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()
        self.process.join(5.0)
        self.process.kill()
        self.process.join()

    def tell(self, name: str, *arguments: Any) -> None:
        """Have it do something."""
        self.requests.send((name, *arguments))

    def answer(self) -> Any:
        """What came of it. Raises RuntimeError when it has ended, or says nothing."""
        if not self.requests.poll(ANSWER_S):
            raise RuntimeError(f"{self.process.name} does not answer")
        try:
            return self.requests.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.process.name} ended: see its traceback above") from error

    def ask(self, name: str, *arguments: Any) -> Any:
        """Both."""
        self.tell(name, *arguments)
        return self.answer()


def _both(producer: Process, consumer: Process, send: list[Any], receive: list[Any]) -> Any:
    consumer.tell(*receive)
    producer.tell(*send)
    if not consumer.answer():
        raise RuntimeError(f"{send[0]}: what arrived is not what was sent")
    return producer.answer()


def _pair(stack: ExitStack, producer_sees: str, consumer_sees: str) -> tuple[Process, Process]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    producer = stack.enter_context(Process(Producer, producer_sees, port, ours))
    consumer = stack.enter_context(Process(Consumer, consumer_sees, port, theirs))
    for process in (producer, consumer):
        process.answer()
    return producer, consumer


def one_gpu(rounds: int) -> dict[str, list[float]]:
    """Figures of a single GPU, by round."""
    found: dict[str, list[float]] = {"ipc_same_gpu_us": [], "ipc_same_gpu_copy_in_us": []}
    with ExitStack() as stack:
        producer, consumer = _pair(stack, "0", "0")
        for number in range(WARM_ROUNDS + rounds):
            for copy, name in enumerate(found):
                seconds, _ = _both(producer, consumer, ["lend", bool(copy)], ["open"])
                if number >= WARM_ROUNDS:
                    found[name].append(seconds * 1e6)
    return found


def two_gpus(rounds: int) -> dict[str, list[float]]:
    """Figures of two, by round; bandwidths in GiB/s."""
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        producer, consumer = _pair(stack, "0", "1")
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        copier = stack.enter_context(Process(Copier, "0,1", 0, theirs))
        stack.callback(ours.close)
        copier.answer()
        for preparation in ("join", "open_channel"):
            for process in (producer, consumer):
                process.tell(preparation)
            for process in (producer, consumer):
                process.answer()
        for number in range(WARM_ROUNDS + rounds):
            whole, copy = _both(producer, consumer, ["lend", False], ["open"])
            seconds = {
                "ipc_two_gpus_gib_per_s": (whole, 1),
                "ipc_two_gpus_copy_gib_per_s": (copy, 1),
                "peer_copy_gib_per_s": (copier.ask("copy"), 1),
            }
            for kind, way in (("nccl", "links"), ("dist", "dist")):
                for count, name in ((1, f"{kind}_one_gib_per_s"), (WINDOW, f"{kind}_gib_per_s")):
                    send, receive = [f"{way}_send", count], [f"{way}_receive", count]
                    seconds[name] = (_both(producer, consumer, send, receive), count)
            for count, one in ((1, "_one"), (WINDOW, "")):
                send, receive = ["channel_send", count], ["channel_receive", count]
                viewed, acked = _both(producer, consumer, send, receive)
                seconds[f"nccl_channel{one}_gib_per_s"] = (viewed, count)
                seconds[f"nccl_channel_acked{one}_gib_per_s"] = (acked, count)
            if number >= WARM_ROUNDS:
                for name, (spent, count) in seconds.items():
                    found.setdefault(name, []).append(count / spent)
        consumer.tell("die")
        found["nccl_dead_peer_ms"] = [producer.ask("send_into_nothing")]
    return found


def measure(rounds: int = 7) -> dict[str, Any]:
    """All figures that this machine has GPUs for. Raises RuntimeError where it has none."""
    count = torch.cuda.device_count()
    if not count:
        raise RuntimeError("device tensors need an NVIDIA GPU, and torch sees none")
    load = MachineLoad()
    found = one_gpu(rounds)
    if count > 1:
        found |= two_gpus(rounds)
    around = surroundings()
    around["hardware"]["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
    around["hardware"]["peer_access"] = count > 1 and torch.cuda.can_device_access_peer(0, 1)
    around["versions"] |= {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "cuda-bindings": importlib.metadata.version("cuda-bindings"),
    }
    return {
        **{name: round(statistics.median(values), 1) for name, values in found.items()},
        "rounds": {name: [round(value, 1) for value in values] for name, values in found.items()},
        "window": WINDOW,
        **around,
        "load": load.report(),
    }


def main() -> int:
    """Run what the machine has GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    try:
        results = measure(arguments.rounds)
    except RuntimeError as error:
        print(f"bench.device_tensors: {error}", file=sys.stderr)
        return 1
    print(json.dumps(results, indent=None if arguments.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
