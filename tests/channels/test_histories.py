"""Channels under random histories of tasks: puts, calls and gets that wait, are cancelled, lose their peers.

`test_protocol.py` does this to the ends without I/O. Here it is about what the shell adds: tasks that wait for places
and items, bounds in items and bytes, results, cancellation between any two turns of the loop.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from channels.channel import ChannelRouter, Consumer, Item, Producer
from channels.errors import Closed
from channels.inline import InlineEndpoint, InlineHub

PRODUCERS = ("p", "q")
CONSUMERS = ("a", "b", "c")
BOUND = 4
BOUND_BYTES = 100
LARGEST = 80
WEIGHTS = {
    "put": 6,
    "get": 6,
    "finish": 5,
    "turn": 6,
    "cancel_task": 3,
    "resize": 1,
    "crash_consumer": 1,
    "crash_producer": 1,
    "part": 1,
}


class Histories(RuleBasedStateMachine):
    """The model: for each item that was put, whether its producer still lives and whether it was worked off.

    Nothing is worked off that was not put; one that was is worked off once, unless its consumer crashed, was parted
    from its producer, or handed it back; and in the end each whose producer lives was worked off.
    """

    @initialize(capacities=st.lists(st.integers(0, 3), min_size=3, max_size=3))
    def begin(self, capacities: list[int]) -> None:
        self.loop = asyncio.new_event_loop()
        self.caught: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.caught.append(context))
        self.next_item = 0
        self.accidents = 0
        self.epoch = Counter[str]()
        self.put_by: dict[int, tuple[str, int]] = {}  # item → producer and epoch
        self.withdrawn: set[int] = set()
        self.worked_off = Counter[int]()
        self.again: set[int] = set()  # handed back
        self.held: dict[str, list[Item]] = {name: [] for name in CONSUMERS}
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: dict[str, InlineEndpoint] = {}
        self.producers: dict[str, Producer] = {}
        self.consumers: dict[str, Consumer] = {}
        self.do(self.meet_all(capacities))

    async def meet_all(self, capacities: list[int]) -> None:
        self.hub = InlineHub()
        for name in PRODUCERS:
            self.start_producer(name)
        for name, capacity in zip(CONSUMERS, capacities, strict=True):
            self.start_consumer(name, capacity)

    def start_producer(self, name: str) -> None:
        router = self.connect(name, CONSUMERS)
        self.epoch[name] += 1
        producer = router.producer(
            "work", bound=BOUND, bound_bytes=BOUND_BYTES, epoch=self.epoch[name]
        )
        self.producers[name] = producer
        for peer, consumer in self.consumers.items():
            producer.add_consumer(peer)
            consumer.add_producer(name)

    def start_consumer(self, name: str, capacity: int) -> None:
        consumer = self.connect(name, PRODUCERS).consumer("work", capacity=capacity)
        self.consumers[name] = consumer
        for peer, producer in self.producers.items():
            consumer.add_producer(peer)
            producer.add_consumer(name)

    def connect(self, name: str, peers: tuple[str, ...]) -> ChannelRouter:
        endpoint = self.ends[name] = self.hub.endpoint(name)
        for peer in peers:
            if peer in self.ends:
                endpoint.connect(peer, self.ends[peer].address)
                self.ends[peer].connect(name, endpoint.address)
        return ChannelRouter(endpoint)

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(work)

    # One rule with weights: were each act a rule, most histories would lack puts or turns.
    @rule(seed=st.integers(0, 2**64 - 1))
    def act(self, seed: int) -> None:
        random = Random(seed)
        for act in random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=4):
            self.do(getattr(self, act)(random))
            self.check()

    async def put(self, random: Random) -> None:
        name = random.choice(PRODUCERS)
        item = self.next_item = self.next_item + 1
        size = random.choice([0, 1, 30, LARGEST])
        waits = random.choice([self.put_one, self.call_one])
        self.start(waits(name, item, bytes(size), random.randrange(2)))

    async def put_one(self, name: str, item: int, data: bytes, priority: int) -> None:
        producer, epoch = self.producers[name], self.epoch[name]
        await producer.put([item, data], priority=priority)
        self.put_by[item] = (name, epoch)

    async def call_one(self, name: str, item: int, data: bytes, priority: int) -> None:
        producer = self.producers[name]
        self.withdrawn.add(item)  # until it is answered it may be withdrawn at any time
        result = await producer.call([item, data], priority=priority)
        assert result == -item
        assert self.worked_off[item] >= 1, "answered and not worked off"

    async def get(self, random: Random) -> None:
        self.start(self.get_one(random.choice(CONSUMERS)))

    async def get_one(self, name: str) -> None:
        item = await self.consumers[name].get()
        self.held[name].append(item)

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(self.loop.create_task(work))

    async def finish(self, random: Random) -> None:
        held = self.held[random.choice(CONSUMERS)]
        for _ in range(min(len(held), random.randint(1, 3))):
            self.finish_one(held.pop(random.randrange(len(held))), random.random() < 0.2)

    def finish_one(self, item: Item, hand_back: bool) -> None:
        number = item.payload[0]
        if hand_back:
            self.again.add(number)
            item.hand_back()
            return
        if not item.cancelled:
            self.worked_off[number] += 1
            unusual = self.accidents or number in self.again
            assert self.worked_off[number] == 1 or unusual, "worked off twice"
        item.ack(-number)

    async def turn(self, random: Random) -> None:
        for _ in range(random.randint(1, 6)):
            await asyncio.sleep(0)
            if random.random() < 0.2:  # perhaps in the very turn in which a task was woken
                await self.cancel_task(random)

    async def cancel_task(self, random: Random) -> None:
        if self.tasks:
            random.choice(self.tasks).cancel()

    async def resize(self, random: Random) -> None:
        self.consumers[random.choice(CONSUMERS)].capacity = random.randrange(4)

    async def part(self, random: Random) -> None:
        """A living pair is parted by mistake and meets again."""
        producer, consumer = random.choice(PRODUCERS), random.choice(CONSUMERS)
        self.accidents += 1
        self.producers[producer].remove_consumer(consumer)
        self.consumers[consumer].remove_producer(producer)
        await self.turn(random)
        self.producers[producer].add_consumer(consumer)
        self.consumers[consumer].add_producer(producer)

    async def crash_consumer(self, random: Random) -> None:
        """What it held is lost with it; the producers hear of it."""
        name = random.choice(CONSUMERS)
        self.accidents += 1
        self.ends.pop(name).close()
        self.consumers.pop(name).close()
        self.held[name].clear()
        for producer in self.producers.values():
            producer.remove_consumer(name)
        await self.turn(random)
        self.start_consumer(name, random.randrange(4))

    async def crash_producer(self, random: Random) -> None:
        """What it had put is lost with it; the consumers hear of it."""
        name = random.choice(PRODUCERS)
        self.ends.pop(name).close()
        self.producers.pop(name).close()
        for consumer in self.consumers.values():
            consumer.remove_producer(name)
        await self.turn(random)
        self.start_producer(name)

    def check(self) -> None:
        """Bounds hold at any time, and no task fails but those whose end was closed."""
        assert not self.caught, self.caught
        for producer in self.producers.values():
            there = producer.statistics()
            assert there.depth + there.in_flight <= BOUND
            assert there.size_bytes < BOUND_BYTES + LARGEST
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                # KeyError: its producer or consumer had crashed before the task ran for the first time.
                assert isinstance(error, Closed | KeyError), error

    async def end(self) -> None:
        for consumer in self.consumers.values():
            consumer.capacity = 2
        gets = [task for task in self.tasks if task.get_coro().__name__ == "get_one"]
        for task in gets:
            task.cancel()
        for _ in range(400):
            await asyncio.sleep(0)
            for name, consumer in self.consumers.items():
                while (item := consumer.get_nowait()) is not None:
                    self.held[name].append(item)
                while self.held[name]:
                    self.finish_one(self.held[name].pop(), hand_back=False)
        for producer in self.producers.values():
            there = producer.statistics()
            assert (there.depth, there.in_flight, there.waiters) == (0, 0, 0), "stuck"
            assert there.size_bytes == 0
            fresh = [self.loop.create_task(producer.put([0, b""])) for _ in range(BOUND)]
            for _ in range(3):
                await asyncio.sleep(0)
            assert all(task.done() for task in fresh), "a place under the bound was lost"
        for consumer in self.consumers.values():
            here = consumer.statistics()
            assert (here.in_flight, here.waiters) == (0, 0), "a slot or a waiting get was left"

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self.do(self.end())
            self.check()
            assert not [t for t in self.tasks if not t.done()], "a task waits for ever"
            for item, (name, epoch) in self.put_by.items():
                lives = self.epoch[name] == epoch
                assert self.worked_off[item] or not lives, "lost"
            for item in self.worked_off:
                assert item in self.put_by or item in self.withdrawn, "worked off, and never put"
        finally:
            self.do(self.close())
            self.loop.close()

    async def close(self) -> None:
        for end in (*self.producers.values(), *self.consumers.values(), *self.ends.values()):
            end.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "examples",
    [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_random_histories_lose_and_double_nothing(examples: int) -> None:
    """See `Histories`."""
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=examples, stateful_step_count=30, deadline=None)
    )
