"""How fast is a call over a channel, against a bare echo over drained ZeroMQ sockets?

    python -m bench.calls --json

Two processes over ipc, uvloop. Rounds of both kinds are interleaved; each figure is the median over
rounds, so a change of the machine's load meets both. `call`: `producer.call`, one at a time.
`pipelined`: 256 calls in flight. `raw`: the same on two ROUTER/DEALER pairs with msgpack numbers, no
channel. `group`: a group of 8 one-turn segments there, a number back.
"""

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import uvloop
import zmq

from actors.episodes import Action, Group, Sampling, Segment, Turn
from channels.channel import ChannelRouter
from channels.endpoint import ZmqEndpoint
from channels.payload import decode, encode, register
from channels.sockets import DrainedSocket

WINDOW = 256

for cls in (Action, Group, Sampling, Segment, Turn):
    register(cls, f"bench.{cls.__name__}")


def make_group(tokens: int = 40) -> Group:
    """A group as arithmetic makes it: 8 segments of one turn, 40 tokens each."""
    random = np.random.default_rng(0)

    def segment(sample: int) -> Segment:
        action = Action(
            prompt=np.arange(20, dtype=np.int32),
            tokens=random.integers(0, 99, tokens, dtype=np.int32),
            logprobs=random.random(tokens, dtype=np.float32),
            versions=np.zeros(tokens, np.int32),
            mask=np.ones(tokens, np.bool_),
            text="12+13=25",
        )
        turn = Turn(observation="12+13=", action=action, reward=1.0)
        return Segment(sample=sample, turns=(turn,), info={"correct": 1.0})

    segments = tuple(segment(sample) for sample in range(8))
    return Group(group=0, attempt=0, run_attempt=0, seed=2**60, segments=segments)


class RawClient:
    """Numbers to the other process and back, on sockets alone."""

    def __init__(self, mailbox: str, peer: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        router = context.socket(zmq.ROUTER)
        router.bind(mailbox)
        self.socket = DrainedSocket(router, self._received)
        self.dealer = context.socket(zmq.DEALER)
        self.dealer.connect(peer)
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.next = 0

    def _received(self, frames: list[zmq.Frame]) -> None:
        number, value = msgpack.unpackb(frames[1].bytes)
        self.waiting.pop(number).set_result(value)

    async def call(self, value: int) -> Any:
        self.next += 1
        future = self.waiting[self.next] = asyncio.get_running_loop().create_future()
        self.dealer.send(msgpack.packb((self.next, value)), zmq.NOBLOCK)
        return await future

    def close(self) -> None:
        self.socket.close()
        self.dealer.close(0)


async def serve(directory: str) -> None:
    """The other process: a raw echo and a consumer, until stdin ends."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"ipc://{directory}/raw-client")
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{directory}/raw-server")

    def echo(frames: list[zmq.Frame]) -> None:
        number, value = msgpack.unpackb(frames[1].bytes)
        dealer.send(msgpack.packb((number, value + 1)), zmq.NOBLOCK)

    raw = DrainedSocket(router, echo)
    endpoint = ZmqEndpoint("server", f"ipc://{directory}/server")
    endpoint.connect("client", f"ipc://{directory}/client")
    consumer = ChannelRouter(endpoint).consumer("calls", capacity=2 * WINDOW)
    consumer.add_producer("client")

    async def work() -> None:
        while True:
            item = await consumer.get()
            item.ack(item.payload + 1 if isinstance(item.payload, int) else 0)

    worker = asyncio.create_task(work())
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    raw.close()
    dealer.close(0)
    endpoint.close()


async def one_at_a_time(call: Callable[[Any], Awaitable[Any]], value: Any, count: int) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await call(value)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


async def pipelined(call: Callable[[Any], Awaitable[Any]], value: Any, count: int) -> float:
    """Calls per second with WINDOW of them in flight."""
    left = iter(range(count))

    async def lane() -> None:
        for _ in left:
            await call(value)

    start = time.perf_counter()
    await asyncio.gather(*(lane() for _ in range(WINDOW)))
    return count / (time.perf_counter() - start)


async def measure(directory: str, rounds: int, calls: int) -> dict[str, float]:
    """All figures, medians over rounds."""
    raw = RawClient(f"ipc://{directory}/raw-client", f"ipc://{directory}/raw-server")
    endpoint = ZmqEndpoint("client", f"ipc://{directory}/client")
    endpoint.connect("server", f"ipc://{directory}/server")
    producer = ChannelRouter(endpoint).producer("calls", bound=2 * WINDOW)
    producer.add_consumer("server")
    group = make_group()
    await one_at_a_time(raw.call, 1, calls // 4)
    await one_at_a_time(producer.call, 1, calls // 4)
    seen: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        seen.setdefault(key, []).append(value)

    for _ in range(rounds):
        note("raw_call_us_p50", await one_at_a_time(raw.call, 1, calls))
        note("call_us_p50", await one_at_a_time(producer.call, 1, calls))
        note("raw_calls_per_s", await pipelined(raw.call, 1, 10 * calls))
        note("calls_per_s", await pipelined(producer.call, 1, 10 * calls))
        note("group_call_us_p50", await one_at_a_time(producer.call, group, calls // 2))
        note("groups_per_s", await pipelined(producer.call, group, calls))
        encoded = encode(group)
        start = time.perf_counter()
        for _ in range(200):
            encode(group)
        note("group_encode_us", (time.perf_counter() - start) / 200 * 1e6)
        start = time.perf_counter()
        for _ in range(200):
            decode(encoded.header, encoded.buffers)
        note("group_decode_us", (time.perf_counter() - start) / 200 * 1e6)
    raw.close()
    producer.close()
    endpoint.close()
    return {key: statistics.median(values) for key, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=1000, help="sequential calls per round")
    parser.add_argument("--serve", metavar="DIRECTORY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve(options.serve))
        return
    with tempfile.TemporaryDirectory(prefix="calls-") as directory:
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.calls", "--serve", directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdout.readline()
            figures = uvloop.run(measure(directory, options.rounds, options.calls))
        finally:
            server.stdin.close()
            server.wait()
    figures["call_over_raw"] = figures["call_us_p50"] / figures["raw_call_us_p50"]
    figures["calls_per_s_over_raw"] = figures["calls_per_s"] / figures["raw_calls_per_s"]
    facts: dict[str, Any] = {key: round(value, 3) for key, value in figures.items()}
    facts |= {
        "rounds": options.rounds,
        "calls": options.calls,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
    }
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key:24} {value}")


if __name__ == "__main__":
    main()
