"""The contract of channels, the same on every transport: by reference, ipc sockets, shared memory, TCP, and on devices
(here of files) CUDA IPC and NCCL.

Here all ends share a loop; `test_conformance_processes.py` has the cases for which they must not.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import numpy as np
import pytest
from channel_peers import MakeWeb, Run, cancelled, settle, until

from channels.channel import Consumer, Item, Producer
from channels.errors import Closed, TooLarge, Withdrawn
from channels.messages import Message


class Aside(Message, frozen=True, tag="test_aside"):
    """A message that belongs to no channel."""


def test_call_returns_what_the_consumer_acknowledged(run: Run, web: MakeWeb) -> None:
    """Payload, key and priority there; the result back."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair()
        call = asyncio.create_task(producer.call({"x": 2}, key="k", priority=3))
        item = await consumer.get()
        assert (item.payload, item.key, item.priority) == ({"x": 2}, "k", 3)
        assert (item.producer, item.attempt, item.cancelled) == ("p", 1, False)
        item.ack({"y": 4})
        assert await call == {"y": 4}
        await producer.drained()
        w.close()

    run(main)


def test_many_calls_through_two_consumers(run: Run, web: MakeWeb) -> None:
    """Every call gets its own answer, and both consumers take part."""

    async def main() -> None:
        w = web()
        producer, first = w.pair(bound=64, capacity=4)
        second = w.consumer("b", 4)
        served = {"a": 0, "b": 0}

        async def work(name: str, consumer: Consumer) -> None:
            while True:
                item = await consumer.get()
                served[name] += 1
                item.ack(item.payload * 2)

        async with asyncio.TaskGroup() as group:
            workers = [
                group.create_task(work("a", first)),
                group.create_task(work("b", second)),
            ]
            answers = await asyncio.gather(*(producer.call(n) for n in range(500)))
            for worker in workers:
                worker.cancel()
        assert answers == [2 * n for n in range(500)]
        assert min(served.values()) > 50
        w.close()

    run(main)


def test_faster_consumer_takes_more(run: Run, web: MakeWeb) -> None:
    """One consumer holds its single item until the other has worked off all the rest."""

    async def main() -> None:
        w = web()
        producer, slow = w.pair(bound=100, capacity=1)
        fast = w.consumer("b", 1)
        for number in range(50):
            await producer.put(number)
        held = await slow.get()
        for _ in range(49):
            (await fast.get()).ack()
        held.ack()
        await producer.drained()
        w.close()

    run(main)


def test_put_waits_at_the_bound_first_come_first_served(run: Run, web: MakeWeb) -> None:
    """A slow consumer stops the producer; waiting puts go on in the order they came."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=2, capacity=1)
        done: list[int] = []

        async def put(number: int) -> None:
            await producer.put(number)
            done.append(number)

        tasks = [asyncio.create_task(put(n)) for n in range(5)]
        item = await consumer.get()
        await settle()
        assert done == [0, 1]
        assert producer.statistics().waiters == 3
        assert consumer.get_nowait() is None
        for expected in range(1, 5):
            item.ack()
            item = await consumer.get()
            assert item.payload == expected
        item.ack()
        await asyncio.gather(*tasks)
        assert done == [0, 1, 2, 3, 4]
        await producer.drained()
        w.close()

    run(main)


def test_put_waits_at_the_bound_in_bytes(run: Run, web: MakeWeb) -> None:
    """Less than the bound and one item are held, however large that is; none overtakes while it waits."""

    async def main() -> None:
        w = web()
        producer = w.router("p").producer("work", bound=100, bound_bytes=25_000)
        consumer = w.consumer("a", 100)
        tasks = [asyncio.create_task(producer.put(bytes(10_000))) for _ in range(4)]
        tasks += [asyncio.create_task(producer.put(bytes(n))) for n in (80_000, 1, 2)]
        sizes = []
        most = 0
        for in_turn in (3, 2, 2):  # so many come each time that all were acknowledged
            items = [await consumer.get() for _ in range(in_turn)]
            await settle()
            assert consumer.get_nowait() is None
            most = max(most, producer.statistics().size_bytes)
            sizes += [len(item.payload) for item in items]
            for item in items:
                item.ack()
        await asyncio.gather(*tasks)
        await producer.drained()
        assert sizes == [10_000] * 4 + [80_000, 1, 2]
        assert most == pytest.approx(90_000, rel=0.01)
        assert producer.statistics().size_bytes == 0
        with pytest.raises(ValueError, match="bound_bytes = 0"):
            w.routers["p"].producer("other", bound=1, bound_bytes=0)
        w.close()

    run(main)


def test_cancelled_put_gives_its_place_to_the_next(run: Run, web: MakeWeb) -> None:
    """Cancelled while it waits, and cancelled in the very turn in which a slot was given to it."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=1, capacity=1)
        await producer.put("first")
        item = await consumer.get()
        waiting = [asyncio.create_task(producer.put(n)) for n in range(3)]
        await settle()
        await cancelled(waiting[0])
        item.ack()
        await until(lambda: not producer.statistics().in_flight)
        await cancelled(waiting[1])  # its slot was free, it had not run yet
        await waiting[2]
        item = await consumer.get()
        assert item.payload == 2
        item.ack()
        await producer.drained()
        assert producer.statistics().items == 2
        w.close()

    run(main)


def test_cancelled_call_withdraws_its_item_or_tells_the_consumer(run: Run, web: MakeWeb) -> None:
    """Queued items vanish; an item that was taken shows it, and its acknowledgement goes nowhere."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=4, capacity=1)
        taken, queued = (asyncio.create_task(producer.call(n)) for n in range(2))
        item = await consumer.get()
        watch = asyncio.create_task(item.wait_cancelled())
        await settle()
        await cancelled(queued)
        assert producer.statistics().depth == 0
        assert not item.cancelled
        await cancelled(taken)
        await watch
        assert item.cancelled
        await item.wait_cancelled()  # also when asked late
        assert not producer._drained.is_set()
        item.ack("too late")
        await producer.drained()
        w.close()

    run(main)


def test_cancelled_get_loses_nothing(run: Run, web: MakeWeb) -> None:
    """Cancelled while it waits, and in the turn in which an item woke it: the next one gets it."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair()
        first, second = (asyncio.create_task(consumer.get()) for _ in range(2))
        await settle()
        await producer.put("x")
        await until(lambda: consumer.statistics().depth == 1)
        await cancelled(first)
        item = await second
        assert item.payload == "x"
        third = asyncio.create_task(consumer.get())
        await settle()
        await cancelled(third)
        assert consumer.statistics().waiters == 0
        item.ack()
        await producer.drained()
        w.close()

    run(main)


def test_cancel_by_predicate(run: Run, web: MakeWeb) -> None:
    """The matching calls end with Withdrawn, wherever their items are; the others go on."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=8, capacity=2)
        calls = [asyncio.create_task(producer.call(n, key=f"k{n % 2}")) for n in range(6)]
        items = [await consumer.get(), await consumer.get()]
        assert producer.cancel(lambda pending: pending.key == "k1") == 3
        results = await asyncio.gather(*calls[1::2], return_exceptions=True)
        assert all(isinstance(result, Withdrawn) for result in results)
        await items[1].wait_cancelled()
        for item in items:
            item.ack(item.payload)
        for number in (2, 4):
            item = await consumer.get()
            assert item.payload == number
            item.ack(number)
        assert await asyncio.gather(*calls[0::2]) == [0, 2, 4]
        await producer.drained()
        w.close()

    run(main)


def test_hand_back_goes_to_another_with_the_new_payload(run: Run, web: MakeWeb) -> None:
    """A leaving rollout hands back what it had so far; another one goes on from there."""

    async def main() -> None:
        w = web()
        producer, first = w.pair()
        call = asyncio.create_task(producer.call([1]))
        item = await first.get()
        second = w.consumer("b", 4)
        # Before it is there, the item may come back to whoever still has credit.
        await until(lambda: any(e.credit for e in producer.edges() if e.consumer == "b"))
        first.capacity = 0
        item.hand_back([*item.payload, 2])
        again = await second.get()
        assert (again.payload, again.attempt) == ([1, 2], 2)
        again.ack("done")
        assert await call == "done"
        assert first.statistics().in_flight == 0
        w.close()

    run(main)


def test_urgent_items_overtake(run: Run, web: MakeWeb) -> None:
    """What waits at the producer is ordered by priority."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=10, capacity=1)
        await producer.put("running")
        item = await consumer.get()
        for name, priority in (("low", -1), ("normal", 0), ("high", 9)):
            await producer.put(name, priority=priority)
        order = []
        for _ in range(3):
            item.ack()
            item = await consumer.get()
            order.append(item.payload)
        assert order == ["high", "normal", "low"]
        w.close()

    run(main)


@pytest.mark.parametrize("consumer_first", [True, False])
def test_introductions_in_either_order_and_twice(
    run: Run, web: MakeWeb, consumer_first: bool
) -> None:
    """One side hears of the other long before, with items already queued."""

    async def main() -> None:
        w = web()
        producer = w.router("p").producer("work", bound=8)
        consumer = w.router("a").consumer("work", capacity=2)
        introductions: list[Callable[[], None]] = [
            lambda: producer.add_consumer("a"),
            lambda: consumer.add_producer("p"),
        ]
        if consumer_first:
            introductions.reverse()
        await producer.put("early")
        for introduce in introductions:
            introduce()
            await settle()
            introduce()
        item = await consumer.get()
        assert item.payload == "early"
        item.ack()
        await producer.drained()
        w.close()

    run(main)


def test_removed_and_added_again_in_one_turn(run: Run, web: MakeWeb) -> None:
    """The consumer's item is cancelled there and delivered anew; its old acknowledgement is ignored."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair()
        call = asyncio.create_task(producer.call("x"))
        item = await consumer.get()
        producer.remove_consumer("a")
        producer.add_consumer("a")
        again = await consumer.get()
        assert item.cancelled
        assert again.attempt == 2
        item.ack("old")
        again.ack("new")
        assert await call == "new"
        w.close()

    run(main)


def test_restarted_producer_with_a_higher_epoch(run: Run, web: MakeWeb) -> None:
    """Same name, new mailbox: the older one's items are cancelled, the newer one's arrive."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair()
        await producer.put("old taken")
        item = await consumer.get()
        w.routers.pop("p").endpoint.close()  # as a crash: no farewell
        router = w.router("p")
        new = router.producer("work", bound=8, epoch=1)
        new.add_consumer("a")
        await new.put("new")
        fresh = await consumer.get()
        assert fresh.payload == "new"
        assert item.cancelled
        item.ack()
        fresh.ack()
        await new.drained()
        w.close()

    run(main)


def test_close_of_a_producer(run: Run, web: MakeWeb) -> None:
    """Callers and waiting puts get Closed; the consumer sees its item cancelled."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=1)
        call = asyncio.create_task(producer.call("x"))
        item = await consumer.get()
        waiting = asyncio.create_task(producer.put("y"))
        await settle()
        producer.close()
        producer.close()
        for task in (call, waiting):
            with pytest.raises(Closed, match="work"):
                await task
        with pytest.raises(Closed):
            await producer.put("z")
        await item.wait_cancelled()
        await producer.drained()
        w.routers["p"].producer("work", bound=1)  # the name is free again
        w.close()

    run(main)


def test_close_of_a_consumer(run: Run, web: MakeWeb) -> None:
    """Its items go to another; waiting gets end."""

    async def main() -> None:
        w = web()
        producer, first = w.pair(capacity=1)
        call = asyncio.create_task(producer.call("x"))
        item = await first.get()
        waiting = asyncio.create_task(first.get())
        second = w.consumer("b", 1)
        await settle()
        first.close()
        with pytest.raises(Closed):
            await waiting
        assert item.cancelled
        (await second.get()).ack("from b")
        assert await call == "from b"
        w.close()

    run(main)


def test_close_of_a_consumer_says_first_what_it_finished(run: Run, web: MakeWeb) -> None:
    """Acknowledged and handed back in the same turn of the loop: results and new payloads arrive, in this order."""

    async def main() -> None:
        w = web()
        producer, first = w.pair(capacity=3)
        done, begun, untouched = (asyncio.create_task(producer.call(x)) for x in "dbu")
        items = [await first.get() for _ in range(3)]
        items[0].ack("done")
        items[1].hand_back("half done")
        first.close()
        assert await done == "done"
        second = w.consumer("b", 2)
        again = {item.payload: item for item in [await second.get(), await second.get()]}
        assert set(again) == {"half done", "u"}
        for payload, item in again.items():
            item.ack(payload)
        assert await begun == "half done"
        assert await untouched == "u"
        w.close()

    run(main)


def test_other_messages_reach_the_actor(run: Run, web: MakeWeb) -> None:
    """The router takes out what belongs to channels, known ones or not."""

    async def main() -> None:
        w = web()
        first, second = w.router("p"), w.router("a")
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        second.on_message = lambda *received: arrived.put_nowait(received)
        first.producer("unknown there", bound=1).add_consumer("a")
        await settle()
        first.endpoint.send("a", Aside(), [1])
        assert await arrived.get() == ("p", Aside(), [1])
        with pytest.raises(ValueError, match="already produces"):
            first.producer("unknown there", bound=1)
        w.close()

    run(main)


def test_statistics(run: Run, web: MakeWeb) -> None:
    """Depth, bound, in flight, waiters and peers of both ends."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=4, capacity=2)
        for number in range(4):
            await producer.put(bytes(100 + number))
        waiting = asyncio.create_task(producer.put(b""))
        items: list[Item] = [await consumer.get()]
        await until(lambda: consumer.statistics().depth == 1)
        there, here = producer.statistics(), consumer.statistics()
        assert (there.channel, there.depth, there.in_flight, there.bound) == ("work", 2, 2, 4)
        assert (there.waiters, there.items, there.peers) == (1, 4, 1)
        assert (here.depth, here.in_flight, here.bound, here.items) == (1, 1, 2, 2)
        assert 406 <= there.size_bytes <= 450 + 4 * w.load_bytes
        items[0].ack()
        await waiting
        w.close()

    run(main)


def test_item_over_the_limit_is_refused_where_it_is_put(run: Run, web: MakeWeb) -> None:
    """The error says the size and the limit; the slot is free, and the channel goes on."""

    async def main() -> None:
        w = web(max_payload_bytes=200_000)
        producer, consumer = w.pair(bound=1)
        for attempt in (producer.put, producer.call):
            with pytest.raises(
                TooLarge, match=r"of 300\d\d\d bytes is over the limit of 200000: send it in parts"
            ):
                await attempt(np.zeros(300_000, np.uint8))
        await producer.put(np.arange(150_000, dtype=np.uint8))
        item = await consumer.get()
        np.testing.assert_array_equal(item.payload, np.arange(150_000, dtype=np.uint8))
        item.ack()
        await producer.drained()
        w.close()

    run(main)


def test_items_that_exceed_the_limit_together_all_arrive(run: Run, web: MakeWeb) -> None:
    """Put in one turn, and answered in one turn: no message is over the limit, up to its last byte."""

    async def main() -> None:
        w = web(max_payload_bytes=100_000)
        producer, consumer = w.pair(bound=20, capacity=20)
        sizes = [60_000] * 8 + [99_950 - w.load_bytes, 100, 99_000]
        with pytest.raises(TooLarge):
            await producer.put([bytes(100_001)])
        calls = [asyncio.create_task(producer.call(bytes(size))) for size in sizes]
        items = [await consumer.get() for _ in sizes]
        for item in items:
            item.ack(item.payload)
        assert [len(result) for result in await asyncio.gather(*calls)] == sizes
        await producer.drained()
        w.close()

    run(main)


def test_items_of_each_producer_keep_their_order(run: Run, web: MakeWeb) -> None:
    """Three producers at once, one consumer: each one's items come in the order they were put."""

    async def main() -> None:
        w = web()
        names = ("p", "q", "r")
        producers = {name: w.router(name).producer("work", bound=7) for name in names}
        consumer = w.router("a").consumer("work", capacity=5)
        for name, producer in producers.items():
            consumer.add_producer(name)
            producer.add_consumer("a")

        async def put_all(producer: Producer) -> None:
            for number in range(100):
                await producer.put(number)

        async with asyncio.TaskGroup() as group:
            for producer in producers.values():
                group.create_task(put_all(producer))
            came: dict[str, list[int]] = {name: [] for name in names}
            for _ in range(300):
                item = await consumer.get()
                came[item.producer].append(item.payload)
                item.ack()
        assert came == {name: list(range(100)) for name in names}
        w.close()

    run(main)


def test_close_after_drained_is_a_clean_end(run: Run, web: MakeWeb) -> None:
    """The consumer gets all that was put, and after it the farewell, which cancels nothing."""

    async def main() -> None:
        w = web()
        producer, consumer = w.pair(bound=50, capacity=3)
        for number in range(50):
            await producer.put(number)

        async def end() -> None:
            await producer.drained()
            producer.close()

        ending = asyncio.create_task(end())
        for number in range(50):
            item = await consumer.get()
            assert (item.payload, item.attempt, item.cancelled) == (number, 1, False)
            assert not ending.done()
            item.ack()
        await ending
        left = consumer.statistics()
        assert (left.depth, left.in_flight) == (0, 0)
        waiting = asyncio.create_task(consumer.get())
        await settle()
        consumer.close()
        with pytest.raises(Closed):
            await waiting
        w.close()

    run(main)


def test_consumer_removed_by_mistake_has_its_acknowledgement_ignored(
    run: Run, web: MakeWeb
) -> None:
    """Two work on one item, and only the one that holds it now counts; downstream the work id tells them apart."""

    async def main() -> None:
        w = web()
        producer, first = w.pair(capacity=1)
        call = asyncio.create_task(producer.call({"work": 17}))
        slow = await first.get()
        second = w.consumer("b", 1)
        producer.remove_consumer("a")  # flowd took it for dead
        again = await second.get()
        assert (again.payload, again.attempt) == ({"work": 17}, 2)
        sink = w.router("s").consumer("done", capacity=4)
        for name, item in (("a", slow), ("b", again)):
            forward = w.routers[name].producer("done", bound=1)
            forward.add_consumer("s")
            sink.add_producer(name)
            await forward.put(item.payload)
        admitted: set[int] = set()
        new = []
        for _ in range(2):
            item = await sink.get()
            new.append(item.payload["work"] not in admitted)
            admitted.add(item.payload["work"])
            item.ack()
        assert (admitted, new) == ({17}, [True, False])
        slow.ack("from a")
        await settle()
        assert not call.done()
        again.ack("from b")
        assert await call == "from b"
        await producer.drained()
        w.close()

    run(main)


@pytest.mark.parametrize("seed", range(12))
def test_cancelled_at_any_moment_nothing_is_half_done(run: Run, web: MakeWeb, seed: int) -> None:
    """Puts, calls and gets cancelled at random turns: what was put arrives once, what was not never, no slot leaks."""

    async def main() -> None:
        random = Random(seed)
        w = web()
        producer = w.router("p").producer("work", bound=3, bound_bytes=2000)
        consumers = [w.consumer(name, 2) for name in "ab"]
        came: Counter[int] = Counter()
        put: set[int] = set()
        answered: set[int] = set()

        async def put_one(number: int) -> None:
            await producer.put([number, bytes(random.randrange(1500))])
            put.add(number)

        async def call_one(number: int) -> None:
            assert await producer.call([number, b""]) == number
            answered.add(number)

        async def get_one(consumer: Consumer) -> None:
            item = await consumer.get()
            number = item.payload[0]
            came[number] += not item.cancelled
            item.ack(number)

        tasks: list[asyncio.Task[None]] = []
        for number in range(120):
            tasks.append(asyncio.create_task(random.choice([put_one, call_one])(number)))
            tasks.append(asyncio.create_task(get_one(random.choice(consumers))))
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
            if random.random() < 0.5:
                random.choice(tasks).cancel()
        left = [task for task in tasks if not task.done()]
        working = [asyncio.create_task(work_off(get_one, consumer)) for consumer in consumers]
        for task in left:
            if random.random() < 0.5:
                task.cancel()
        # A get that is still there has no more to wait for once all puts and calls have ended.
        producing = [task for task in tasks if task.get_coro().__name__ != "get_one"]
        await asyncio.gather(*producing, return_exceptions=True)
        await producer.drained()
        for task in [*tasks, *working]:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        await asyncio.gather(*working, return_exceptions=True)
        assert put <= came.keys()
        assert answered <= came.keys()
        assert max(came.values()) == 1
        there = producer.statistics()
        assert (there.depth, there.in_flight, there.waiters, there.size_bytes) == (0, 0, 0, 0)
        for consumer in consumers:
            here = consumer.statistics()
            assert (here.depth, here.in_flight, here.waiters) == (0, 0, 0)
        fresh = [asyncio.create_task(producer.put(n)) for n in range(3)]
        await settle()
        assert all(task.done() for task in fresh), "a place under the bound was lost"
        w.close()

    run(main)


async def work_off(
    get_one: Callable[[Consumer], Coroutine[Any, Any, None]], consumer: Consumer
) -> None:
    while True:
        await get_one(consumer)
