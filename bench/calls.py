"""How fast is a call over a channel, against a bare echo over drained ZeroMQ sockets, and against Ray?

    python -m bench.calls --json

Processes over ipc, uvloop. Rounds of all kinds are interleaved; each figure is the median over rounds, so a change of
the machine's load meets all.

`call`: `producer.call`, one at a time. `pipelined`: 256 calls in flight. `raw`: the same on two ROUTER/DEALER pairs
with msgpack numbers, no channel. `ray`: a method of a Ray actor; null where Ray is not installed (the extra `bench`).
`group`: a group of 8 one-turn segments there, a number back.

`brokered`: one typed message to the callee and one back, each through the endpoint of a third process, which decodes
it and sends it on. flowd itself relays no call: it introduces actors, and its own round trips (heartbeat and reply,
lease wanted and granted) end at it. This is what one hop through a daemon would cost.

`dead_peer_call_ms`: from `kill -9` of a peer that holds 16 calls until all of them are over. The third process plays
flowd: it watches a pidfd and says Forget. A channel's calls do not fail then, they go to another consumer: the time
ends when that one has answered.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgpack
import numpy as np
import uvloop
import zmq

from actors.episodes import Action, Group, Sampling, Segment, Turn
from bench.local import MachineLoad, surroundings, tell
from bench.peers import NO_RAY, Peer, ready, start_ray
from channels.channel import ChannelRouter
from channels.lifecycle import Forget
from channels.messages import Message
from channels.payload import decode, encode, register
from channels.socket_endpoint import SocketEndpoint
from channels.sockets import DrainedSocket
from flowd.linux import open_pidfd

WINDOW = 256
HELD_CALLS = 16
MODULE = "bench.calls"
# What each ratio is made of, and the bar that it has to stay below, or to reach.
AT_MOST = {
    "call_over_raw": ("call_us_p50", "raw_call_us_p50", 1.3),
    "call_over_ray": ("call_us_p50", "ray_call_us_p50", 1 / 3),
    "brokered_over_raw": ("brokered_call_us_p50", "raw_call_us_p50", 2.3),
}
AT_LEAST = {
    "calls_per_s_over_raw": ("calls_per_s", "raw_calls_per_s", 0.6),
    "calls_per_s_over_ray": ("calls_per_s", "ray_calls_per_s", 15.0),
}
DEAD_PEER_MS = 50.0

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


class BrokeredCall(Message, frozen=True, tag="bench_brokered_call"):
    """Client to broker to server."""

    to: str
    number: int
    value: int


class BrokeredReply(Message, frozen=True, tag="bench_brokered_reply"):
    """Server to broker to client."""

    to: str
    number: int
    value: int


class Watch(Message, frozen=True, tag="bench_watch"):
    """Client to broker: say Forget when this process is gone."""

    peer: str
    pid: int


class Watching(Message, frozen=True, tag="bench_watching"):
    """Broker to client: from now on."""

    peer: str


def connected(directory: str, name: str, *peers: str) -> SocketEndpoint:
    """An endpoint that is connected to its peers."""
    endpoint = SocketEndpoint(name, f"ipc://{directory}/{name}")
    for peer in peers:
        endpoint.connect(peer, f"ipc://{directory}/{peer}")
    return endpoint


async def until_stdin_ends() -> None:
    ready()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def serve(directory: str) -> None:
    """The callee: a raw echo, a consumer, and an answer to brokered calls."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"ipc://{directory}/raw-client")
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{directory}/raw-server")

    def echo(frames: list[zmq.Frame]) -> None:
        number, value = msgpack.unpackb(frames[1].bytes)
        dealer.send(msgpack.packb((number, value + 1)), zmq.NOBLOCK)

    raw = DrainedSocket(router, echo)
    endpoint = connected(directory, "server", "client", "broker")
    channels = ChannelRouter(endpoint)

    def answer(sender: str, message: Message, payload: Any) -> None:
        assert isinstance(message, BrokeredCall)
        reply = BrokeredReply(to="client", number=message.number, value=message.value + 1)
        endpoint.send(sender, reply)

    channels.on_message = answer

    async def work(channel: str) -> None:
        consumer = channels.consumer(channel, capacity=2 * WINDOW)
        consumer.add_producer("client")
        while True:
            item = await consumer.get()
            item.ack(item.payload + 1 if isinstance(item.payload, int) else 0)

    workers = [asyncio.create_task(work(channel)) for channel in ("calls", "held")]
    await until_stdin_ends()
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    raw.close()
    dealer.close(0)
    endpoint.close()


async def hold(directory: str) -> None:
    """A callee that takes calls, never answers, and says when it has them all."""
    endpoint = connected(directory, "victim", "client")
    consumer = ChannelRouter(endpoint).consumer("held", capacity=2 * HELD_CALLS)
    consumer.add_producer("client")
    ready()
    held = [await consumer.get() for _ in range(HELD_CALLS)]
    print(len(held), flush=True)
    await asyncio.get_running_loop().create_future()


async def broker(directory: str) -> None:
    """In the middle: sends messages on, and tells of processes that are gone."""
    endpoint = connected(directory, "broker", "client", "server")
    loop = asyncio.get_running_loop()

    def gone(peer: str, pidfd: int) -> None:
        loop.remove_reader(pidfd)
        endpoint.send("client", Forget(peer=peer, kind="victim", epoch=0))

    def received(sender: str, message: Message, payload: Any) -> None:
        if isinstance(message, Watch):
            pidfd = open_pidfd(message.pid)
            assert pidfd is not None, f"{message} is gone already"
            loop.add_reader(pidfd, gone, message.peer, pidfd)
            endpoint.send(sender, Watching(peer=message.peer))
        elif isinstance(message, BrokeredCall | BrokeredReply):
            endpoint.send(message.to, message)

    endpoint.on_message = received
    await until_stdin_ends()
    endpoint.close()


ROLES = {"server": serve, "victim": hold, "broker": broker}


class Client:
    """The caller: all ways to call, over one endpoint and a raw pair."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.raw = RawClient(f"ipc://{directory}/raw-client", f"ipc://{directory}/raw-server")
        self.endpoint = connected(directory, "client", "server", "broker")
        self.channels = ChannelRouter(self.endpoint)
        self.channels.on_message = self._received
        self.calls = self.channels.producer("calls", bound=2 * WINDOW)
        self.calls.add_consumer("server")
        self.waiting: dict[int, asyncio.Future[int]] = {}
        self.watching: asyncio.Future[None] | None = None
        self.next = 0

    def _received(self, sender: str, message: Message, payload: Any) -> None:
        if isinstance(message, BrokeredReply):
            self.waiting.pop(message.number).set_result(message.value)
        elif isinstance(message, Watching):
            assert self.watching is not None
            self.watching.set_result(None)
        elif isinstance(message, Forget):  # as an actor does
            self.channels.remove_peer(message.peer)
            self.endpoint.disconnect(message.peer)

    async def brokered(self, value: int) -> int:
        self.next += 1
        future = self.waiting[self.next] = asyncio.get_running_loop().create_future()
        self.endpoint.send("broker", BrokeredCall(to="server", number=self.next, value=value))
        return await future

    async def dead_peer(self) -> float:
        """Milliseconds from `kill -9` of who holds calls until they are over."""
        self.endpoint.connect("victim", f"ipc://{self.directory}/victim")
        producer = self.channels.producer("held", bound=HELD_CALLS, epoch=time.monotonic_ns())
        producer.add_consumer("victim")
        victim = await asyncio.to_thread(Peer, MODULE, "victim", self.directory)
        try:
            calls = [asyncio.create_task(producer.call(number)) for number in range(HELD_CALLS)]
            await asyncio.to_thread(victim.expect, str(HELD_CALLS))
            producer.add_consumer("server")
            self.watching = asyncio.get_running_loop().create_future()
            self.endpoint.send("broker", Watch(peer="victim", pid=victim.process.pid))
            await self.watching
            start = time.perf_counter()
            victim.process.kill()
            answers = await asyncio.gather(*calls)
            milliseconds = (time.perf_counter() - start) * 1e3
        finally:
            await asyncio.to_thread(victim.kill)
            producer.close()
        assert answers == [number + 1 for number in range(HELD_CALLS)]
        return milliseconds

    def close(self) -> None:
        self.raw.close()
        self.channels.close()
        self.endpoint.close()


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


async def measure(directory: str, rounds: int, calls: int, ray: Peer | None) -> dict[str, float]:
    """All figures, medians over rounds."""
    client = Client(directory)
    call, raw = client.calls.call, client.raw.call
    group = make_group()
    encoded = encode(group)
    for way in (raw, call, client.brokered):
        await one_at_a_time(way, 1, calls // 4)
    seen: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        seen.setdefault(key, []).append(value)

    async def note_ray(key: str, *words: object) -> None:
        if ray is not None:
            note(key, await asyncio.to_thread(ray.ask, *words))

    for _ in range(rounds):
        note("raw_call_us_p50", await one_at_a_time(raw, 1, calls))
        note("call_us_p50", await one_at_a_time(call, 1, calls))
        note("brokered_call_us_p50", await one_at_a_time(client.brokered, 1, calls))
        await note_ray("ray_call_us_p50", "call", calls // 2)
        note("raw_calls_per_s", await pipelined(raw, 1, 10 * calls))
        note("calls_per_s", await pipelined(call, 1, 10 * calls))
        await note_ray("ray_calls_per_s", "pipelined", 2 * calls, WINDOW)
        note("dead_peer_call_ms", await client.dead_peer())
        note("group_call_us_p50", await one_at_a_time(call, group, calls // 2))
        note("groups_per_s", await pipelined(call, group, calls))
        note("group_encode_us", microseconds(lambda: encode(group)))
        note("group_decode_us", microseconds(lambda: decode(encoded.header, encoded.buffers)))
    client.close()
    return {key: statistics.median(values) for key, values in seen.items()}


def microseconds(work: Callable[[], Any], count: int = 200) -> float:
    """Of one of `count` in a row."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count * 1e6


def judged(figures: Mapping[str, float]) -> dict[str, Any]:
    """The ratios and whether each bar that could be measured is reached; without Ray its figures are null."""
    result: dict[str, Any] = dict(figures)
    reached = [figures["dead_peer_call_ms"] <= DEAD_PEER_MS]
    for bars, side in ((AT_MOST, 1), (AT_LEAST, -1)):
        for name, (ours, theirs, bar) in bars.items():
            if theirs not in figures:
                result |= {theirs: None, name: None, "ray": NO_RAY}
                continue
            result[name] = figures[ours] / figures[theirs]
            reached.append(side * result[name] <= side * bar)
    return result | {"bar_reached": all(reached)}


def main() -> int:
    """Exit code 0 when all bars are reached, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=1000, help="sequential calls per round")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("directory", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        uvloop.run(ROLES[options.role](options.directory))
        return 0
    load = MachineLoad()
    with tempfile.TemporaryDirectory(prefix="calls-") as directory:
        with Peer(MODULE, "server", directory), Peer(MODULE, "broker", directory):
            ray = start_ray()
            try:
                figures = uvloop.run(measure(directory, options.rounds, options.calls, ray))
            finally:
                if ray is not None:
                    ray.stop()
    facts = {
        key: round(value, 3) if isinstance(value, float) else value
        for key, value in judged(figures).items()
    }
    facts |= {"rounds": options.rounds, "calls": options.calls, "load": load.report()}
    facts |= surroundings()
    return tell(facts, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
