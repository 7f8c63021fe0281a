"""How fast do tensors move over a channel, against memcpy, gloo and Ray?

    python -m bench.tensors --json

Two processes, uvloop; rounds of all kinds are interleaved, each figure is the median over rounds. A transfer is
`producer.call` with a float32 array: it ends when the other process has touched one value in 4 KiB, and said their sum.

`shm`: an ordinary array through shared memory: one copy in, a view out. `memcpy`: that copy alone, both ends warm.
`inplace_handoff_us`: an array from `endpoint.empty`, filled before; the time that the receiver needs to touch its pages
is taken off. `item_us_p50`: from `call` to where a consumer has a 1 KiB item, one way. `tcp`: over the loopback, no
encryption; `tcp_curve`: enciphered; `tcp_plain_bulk`: arrays in the clear, with tags. `gloo`: torch.distributed's send
and recv, preallocated, with a number back. `ray`: a torch tensor by `put` to an actor; null where Ray is not installed
(the extra `bench`).
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import uvloop

from bench.local import MachineLoad, surroundings, tell
from bench.peers import NO_RAY, Peer, ready, start_ray
from channels.channel import ChannelRouter, Producer
from channels.security import KEY_BYTES, Security
from channels.socket_endpoint import SocketEndpoint

MODULE = "bench.tensors"
PAGE_FLOATS = 1024
LARGE_BYTES = 64 << 20
IN_PLACE_BYTES = {
    "1_kib": 1 << 10,
    "64_kib": 64 << 10,
    "1_mib": 1 << 20,
    "64_mib": 64 << 20,
    "1_gib": 1 << 30,
}
ITEMS = 200
TRANSFERS = 5  # of each kind in a round
WAYS = ("shm", "tcp", "tcp_curve", "tcp_plain_bulk")
# Of all processes of a run; the figures need no secret.
KEY = bytes(KEY_BYTES)
SECURITIES = {"tcp": None, "tcp_curve": Security(KEY), "tcp_plain_bulk": Security(KEY, True)}
# What each ratio is made of, and the least that it should be.
AT_LEAST = {
    "shm_over_memcpy": ("shm_64mb_gb_per_s", "memcpy_gb_per_s", 0.85),
    "tcp_over_gloo": ("tcp_64mb_gb_per_s", "gloo_64mb_gb_per_s", 0.6),
    "shm_over_ray": ("shm_64mb_gb_per_s", "ray_64mb_gb_per_s", 10.0),
}
HANDOFF_US = 500.0
ITEM_US = 300.0


def touch(array: Any) -> float:
    """Look at each page."""
    return float(array.reshape(-1)[::PAGE_FLOATS].sum())


def endpoint_of(
    name: str, way: str, directory: str, shared: str, address: str = ""
) -> SocketEndpoint:
    """An endpoint for one of the WAYS."""
    if way in SECURITIES:
        return SocketEndpoint(name, address or "tcp://127.0.0.1:*", security=SECURITIES[way])
    return SocketEndpoint(name, f"ipc://{directory}/{name}", shared_dir=Path(shared))


async def sink(directory: str, shared: str, *addresses: str) -> None:
    """The other end of all ways: answers each item with [sum, seconds to touch], or with when it came."""
    endpoints = []

    async def consume(way: str, client: str) -> None:
        endpoint = endpoint_of(f"{way}-sink", way, directory, shared)
        endpoint.connect(f"{way}-client", client)
        endpoints.append(endpoint)
        consumer = ChannelRouter(endpoint).consumer("tensors", capacity=4)
        consumer.add_producer(f"{way}-client")
        print(endpoint.address, flush=True)
        while True:
            item = await consumer.get()
            came = time.perf_counter()
            total = touch(item.payload)
            item.ack([total, time.perf_counter() - came, came])
            del item

    workers = []
    for way, address in zip(WAYS, addresses, strict=True):
        workers.append(asyncio.create_task(consume(way, address)))
        await asyncio.sleep(0)  # their addresses are said in order
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    for endpoint in endpoints:
        endpoint.close()


def join_gloo(directory: str, rank: int) -> None:
    """Rank 0 is the client."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{directory}/gloo", rank=rank, world_size=2)


def gloo_sink(directory: str) -> None:
    """Receives, touches, answers."""
    ready()
    join_gloo(directory, 1)
    buffer = torch.empty(LARGE_BYTES // 4)
    for line in sys.stdin:
        for _ in range(int(line)):
            dist.recv(buffer, 0)
            dist.send(torch.tensor([touch(buffer)]), 0)
    dist.destroy_process_group()


class Client:
    """Sends on all ways."""

    def __init__(self, directory: str, shared: str) -> None:
        self.directory, self.shared = directory, shared
        self.endpoints = {way: endpoint_of(f"{way}-client", way, directory, shared) for way in WAYS}
        self.producers: dict[str, Producer] = {}
        for way, endpoint in self.endpoints.items():
            self.producers[way] = ChannelRouter(endpoint).producer(
                "tensors", bound=4, bound_bytes=4 << 30
            )

    def meet(self, addresses: Mapping[str, str]) -> None:
        for way, address in addresses.items():
            self.endpoints[way].connect(f"{way}-sink", address)
            self.producers[way].add_consumer(f"{way}-sink")

    async def transfer_s(self, way: str, array: Any) -> tuple[float, float]:
        """Seconds of one transfer, and of these for touching."""
        start = time.perf_counter()
        total, touching_s, _ = await self.producers[way].call(array)
        seconds = time.perf_counter() - start
        assert total == touch(array), f"{way}: the sum is {total}, expected {touch(array)}"
        return seconds, touching_s

    async def median_s(self, way: str, array: Any) -> float:
        return statistics.median([(await self.transfer_s(way, array))[0] for _ in range(TRANSFERS)])

    async def handoff_us(self, size_bytes: int) -> float | None:
        """None where the memory that processes share has no room for it."""
        if not room_for(size_bytes, self.shared):
            return None
        times = []
        for number in range(TRANSFERS):
            array = self.endpoints["shm"].empty(size_bytes // 4, np.float32)
            array[:] = number
            seconds, touching_s = await self.transfer_s("shm", array)
            times.append(seconds - touching_s)
            del array
        return statistics.median(times) * 1e6

    async def item_us(self) -> float:
        array = np.ones(256, np.float32)
        times = []
        for _ in range(ITEMS):
            start = time.perf_counter()  # one clock for all processes of a machine
            _, _, came = await self.producers["shm"].call(array)
            times.append(came - start)
        return statistics.median(times) * 1e6

    def close(self) -> None:
        for producer in self.producers.values():
            producer.close()
        for endpoint in self.endpoints.values():
            endpoint.close()


def room_for(size_bytes: int, shared: str) -> bool:
    """Whether a few blocks of this size fit the memory and the tmpfs."""
    status = os.statvfs(shared)
    free = min(psutil.virtual_memory().available, status.f_bavail * status.f_frsize)
    return 4 * size_bytes < free


def memcpy_s(source: Any, target: Any) -> float:
    """Median seconds of a warm copy."""
    times = []
    for _ in range(TRANSFERS):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gloo_s(peer: Peer, tensor: Any) -> float:
    """Median seconds of send and answer."""
    answer = torch.empty(1)
    expected = touch(tensor)
    peer.tell(TRANSFERS)
    times = []
    for _ in range(TRANSFERS):
        start = time.perf_counter()
        dist.send(tensor, 1)
        dist.recv(answer, 1)
        times.append(time.perf_counter() - start)
        assert answer.item() == expected
    return statistics.median(times)


async def measure(
    client: Client, rounds: int, sizes: Mapping[str, int], gloo: Peer, ray: Peer | None
) -> dict[str, Any]:
    """All figures, medians over rounds after one that only warms up."""
    source = (np.arange(LARGE_BYTES // 4) % 97).astype(np.float32)
    target = np.zeros_like(source)
    tensor = torch.from_numpy(source)
    seen: dict[str, list[float]] = {}
    handoffs: dict[str, list[float]] = {}

    def note_rate(key: str, seconds: float) -> None:
        seen.setdefault(key, []).append(LARGE_BYTES / 1e9 / seconds)

    for number in range(rounds + 1):
        if number == 1:
            seen.clear()
            handoffs.clear()
        note_rate("memcpy_gb_per_s", memcpy_s(source, target))
        note_rate("shm_64mb_gb_per_s", await client.median_s("shm", source))
        note_rate("gloo_64mb_gb_per_s", await asyncio.to_thread(gloo_s, gloo, tensor))
        for way in SECURITIES:
            note_rate(f"{way}_64mb_gb_per_s", await client.median_s(way, source))
        if ray is not None:
            seconds = await asyncio.to_thread(ray.ask, "tensor", LARGE_BYTES, TRANSFERS)
            note_rate("ray_64mb_gb_per_s", seconds)
        seen.setdefault("item_us_p50", []).append(await client.item_us())
        for name, size_bytes in sizes.items():
            handoff = await client.handoff_us(size_bytes)
            if handoff is not None:
                handoffs.setdefault(name, []).append(handoff)
    return {key: statistics.median(values) for key, values in seen.items()} | {
        "inplace_handoff_us": {
            name: round(statistics.median(handoffs[name]), 1) if name in handoffs else None
            for name in IN_PLACE_BYTES
        }
    }


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The ratios and whether each bar that could be measured is reached; what was not measured is null."""
    result = dict(figures)
    handoffs = [us for us in figures["inplace_handoff_us"].values() if us is not None]
    reached = [max(handoffs) <= HANDOFF_US, figures["item_us_p50"] <= ITEM_US]
    for name, (ours, theirs, bar) in AT_LEAST.items():
        if theirs not in figures:
            result |= {theirs: None, name: None, "ray": NO_RAY}
            continue
        result[name] = figures[ours] / figures[theirs]
        reached.append(result[name] >= bar)
    return result | {"bar_reached": all(reached)}


async def run(directory: str, shared: str, rounds: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Meet the other processes, measure, leave."""
    client = Client(directory, shared)
    addresses = [client.endpoints[way].address for way in WAYS]
    peers: list[Peer] = []

    def start(role: str, *arguments: str) -> Peer:
        peers.append(Peer(MODULE, role, directory, shared, *arguments))
        return peers[-1]

    try:
        other = await asyncio.to_thread(start, "sink", *addresses)
        client.meet({way: await asyncio.to_thread(other.line) for way in WAYS})
        gloo = await asyncio.to_thread(start, "gloo")
        await asyncio.to_thread(join_gloo, directory, 0)
        ray = await asyncio.to_thread(start_ray)
        if ray is not None:
            peers.append(ray)
        return await measure(client, rounds, sizes, gloo, ray)
    finally:
        for peer in peers:
            await asyncio.to_thread(peer.stop)
        if dist.is_initialized():
            dist.destroy_process_group()
        client.close()


def play_sink(directory: str, shared: str, *addresses: str) -> None:
    ready()
    uvloop.run(sink(directory, shared, *addresses))


def play_gloo(directory: str, shared: str) -> None:
    gloo_sink(directory)


ROLES: dict[str, Callable[..., None]] = {"sink": play_sink, "gloo": play_gloo}


def main() -> int:
    """Exit code 0 when all bars are reached, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-gib", action="store_true", help="nothing larger than 64 MiB")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.role:
        ROLES[options.role](*options.words)
        return 0
    sizes = {
        name: size
        for name, size in IN_PLACE_BYTES.items()
        if size <= LARGE_BYTES or not options.no_gib
    }
    load = MachineLoad()
    with (
        tempfile.TemporaryDirectory(prefix="tensors-") as directory,
        tempfile.TemporaryDirectory(prefix="tensors-", dir="/dev/shm") as shared,
    ):
        figures = uvloop.run(run(directory, shared, options.rounds, sizes))
    facts = {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in judged(figures).items()
    }
    facts |= {"rounds": options.rounds, "transfers": TRANSFERS, "load": load.report()}
    facts |= surroundings()
    return tell(facts, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
