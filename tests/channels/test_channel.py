"""Channels as actors use them: in one loop by reference, over sockets, and between real processes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from channel_peers import Peer, Run

from channels.channel import ChannelRouter, Consumer, Item, Producer
from channels.endpoint import Endpoint, InlineHub, ZmqEndpoint
from channels.errors import ChannelError, Closed, Refused, TooLarge, Withdrawn
from channels.messages import Message


class Aside(Message, frozen=True, tag="test_aside"):
    """A message that belongs to no channel."""


class Web:
    """Routers that are all connected to each other."""

    def __init__(self, make: Callable[[str], Endpoint]) -> None:
        self._make = make
        self.routers: dict[str, ChannelRouter] = {}

    def router(self, name: str) -> ChannelRouter:
        endpoint = self._make(name)
        for other in self.routers.values():
            endpoint.connect(other.endpoint.name, other.endpoint.address)
            other.endpoint.connect(name, endpoint.address)
        self.routers[name] = ChannelRouter(endpoint)
        return self.routers[name]

    def pair(self, bound: int = 8, capacity: int = 4) -> tuple[Producer, Consumer]:
        """A producer "p" and a consumer "a" that know each other."""
        producer = self.router("p").producer("work", bound=bound)
        return producer, self.consumer("a", capacity)

    def consumer(self, name: str, capacity: int) -> Consumer:
        consumer = self.router(name).consumer("work", capacity=capacity)
        consumer.add_producer("p")
        self.routers["p"].producers["work"].add_consumer(name)
        return consumer

    def close(self) -> None:
        for router in self.routers.values():
            router.close()
            router.endpoint.close()


@pytest.fixture(params=["inline", "zmq"])
def web(request: pytest.FixtureRequest, sockets: Path) -> Callable[[], Web]:
    """Makes a web of routers of one kind, within a running loop."""

    def make() -> Web:
        hub = InlineHub()
        count = iter(range(1000))
        if request.param == "inline":
            return Web(hub.endpoint)
        return Web(lambda name: ZmqEndpoint(name, f"ipc://{sockets}/{next(count)}"))

    return make


Make = Callable[[], Web]


async def settle() -> None:
    """Let the loop turn until what was started has gone as far as it can without the network."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop, one turn at a time, until the condition holds; the fixture has the deadline."""
    for _ in iter(condition, True):
        await asyncio.sleep(0)


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and wait for its end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_call_returns_what_the_consumer_acknowledged(run: Run, web: Make) -> None:
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


def test_many_calls_through_two_consumers(run: Run, web: Make) -> None:
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


def test_faster_consumer_takes_more(run: Run, web: Make) -> None:
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


def test_put_waits_at_the_bound_first_come_first_served(run: Run, web: Make) -> None:
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


def test_put_waits_at_the_bound_in_bytes(run: Run, web: Make) -> None:
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


def test_cancelled_put_gives_its_place_to_the_next(run: Run, web: Make) -> None:
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


def test_cancelled_call_withdraws_its_item_or_tells_the_consumer(run: Run, web: Make) -> None:
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


def test_cancelled_get_loses_nothing(run: Run, web: Make) -> None:
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


def test_cancel_by_predicate(run: Run, web: Make) -> None:
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


def test_hand_back_goes_to_another_with_the_new_payload(run: Run, web: Make) -> None:
    """A leaving rollout hands back what it had so far; another one goes on from there."""

    async def main() -> None:
        w = web()
        producer, first = w.pair()
        call = asyncio.create_task(producer.call([1]))
        item = await first.get()
        second = w.consumer("b", 4)
        first.capacity = 0
        item.hand_back([*item.payload, 2])
        again = await second.get()
        assert (again.payload, again.attempt) == ([1, 2], 2)
        again.ack("done")
        assert await call == "done"
        assert first.statistics().in_flight == 0
        w.close()

    run(main)


def test_urgent_items_overtake(run: Run, web: Make) -> None:
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
def test_introductions_in_either_order_and_twice(run: Run, web: Make, consumer_first: bool) -> None:
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


def test_removed_and_added_again_in_one_turn(run: Run, web: Make) -> None:
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


def test_restarted_producer_with_a_higher_epoch(run: Run, web: Make) -> None:
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


def test_close_of_a_producer(run: Run, web: Make) -> None:
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


def test_close_of_a_consumer(run: Run, web: Make) -> None:
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


def test_close_of_a_consumer_says_first_what_it_finished(run: Run, web: Make) -> None:
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


def test_payload_that_cannot_travel_is_refused_at_put_and_ack(run: Run, sockets: Path) -> None:
    """The error is raised where the mistake is, the slot is free, and the item can still be finished."""

    async def main() -> None:
        w = Web(lambda name: ZmqEndpoint(name, f"ipc://{sockets}/{name}", max_payload_bytes=9000))
        producer, consumer = w.pair(bound=1)
        for _ in range(3):
            with pytest.raises(TypeError, match="object"):
                await producer.put(object())
            with pytest.raises(TooLarge, match="over the limit of 9000"):
                await producer.put(bytes(10_000))
        call = asyncio.create_task(producer.call("x"))
        item = await consumer.get()
        with pytest.raises(TypeError, match="object"):
            item.ack(object())
        with pytest.raises(TypeError, match="object"):
            item.hand_back(object())
        assert not item.finished
        item.ack("fine")
        assert await call == "fine"
        with pytest.raises(ChannelError, match="finished before"):
            item.ack()
        w.close()

    run(main)


def test_item_that_the_consumer_cannot_read_fails_its_call(
    run: Run, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets Refused with the reason, one get raises, and the channel goes on."""

    async def main() -> None:
        from channels import payload

        w = Web(lambda name: ZmqEndpoint(name, f"ipc://{sockets}/{name}"))
        producer, consumer = w.pair()
        monkeypatch.setattr(
            w.routers["p"].endpoint,
            "pack",
            lambda tree: (
                payload.Encoded(b"\xc1", b"", []) if tree == "bad" else payload.encode(tree)
            ),
        )
        with pytest.raises(Refused, match='a could not read an item of channel "work"'):
            await producer.call("bad")
        with pytest.raises(ChannelError, match="not a payload"):
            await consumer.get()
        call = asyncio.create_task(producer.call("good"))
        (await consumer.get()).ack(1)
        assert await call == 1
        w.close()

    run(main)


def test_other_messages_reach_the_actor(run: Run, web: Make) -> None:
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


def test_statistics(run: Run, web: Make) -> None:
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
        assert 406 <= there.size_bytes <= 450
        items[0].ack()
        await waiting
        w.close()

    run(main)


def test_killed_consumer_process_has_its_items_taken_by_another(
    run: Run, sockets: Path, start: Callable[..., Peer]
) -> None:
    """kill -9 in mid-item: nothing is lost, and every call is answered by the survivor."""

    async def main() -> None:
        endpoint = ZmqEndpoint("p", f"ipc://{sockets}/p")
        router = ChannelRouter(endpoint)
        producer = router.producer("work", bound=100)

        async def join(role: str, name: str) -> Peer:
            address = f"ipc://{sockets}/{name}"
            peer = start(role, name, address, "p", endpoint.address)
            assert await peer.says() == "ready"
            endpoint.connect(name, address)
            producer.add_consumer(name)
            return peer

        victim = await join("hold", "victim")
        calls = [asyncio.create_task(producer.call(n)) for n in range(20)]
        assert [await victim.says() for _ in range(4)] == [f"holds {n}" for n in range(4)]
        await join("double", "survivor")
        victim.kill()
        router.remove_peer("victim")
        endpoint.disconnect("victim")
        assert await asyncio.gather(*calls) == [2 * n for n in range(20)]
        router.close()
        endpoint.close()

    run(main)


def test_killed_producer_process_cancels_its_items_and_its_successor_is_served(
    run: Run, sockets: Path, start: Callable[..., Peer]
) -> None:
    """kill -9 of a producer: taken items show cancelled; the restarted one's ten items all arrive."""

    async def main() -> None:
        endpoint = ZmqEndpoint("consumer", f"ipc://{sockets}/c")
        router = ChannelRouter(endpoint)
        consumer = router.consumer("work", capacity=4)
        peers = []
        for epoch in range(2):
            address = f"ipc://{sockets}/p{epoch}"
            peers.append(start("produce", "p", address, "consumer", endpoint.address, str(epoch)))
            assert await peers[epoch].says() == "ready"
            endpoint.connect("p", address)
            consumer.add_producer("p")
            if epoch == 0:
                items = [await consumer.get() for _ in range(2)]
                peers[0].kill()
                router.remove_peer("p")
                endpoint.disconnect("p")
                assert all(item.cancelled for item in items)
                assert consumer.get_nowait() is None
                for item in items:
                    item.ack()
        for number in range(10):
            item = await consumer.get()
            assert item.payload == {"epoch": 1, "number": number}
            item.ack()
        assert await peers[1].says() == "drained"
        router.close()
        endpoint.close()

    run(main)


def test_cancellation_reaches_the_other_process(
    run: Run, sockets: Path, start: Callable[..., Peer]
) -> None:
    """An abandoned call is shown to the consumer that works on it."""

    async def main() -> None:
        endpoint = ZmqEndpoint("p", f"ipc://{sockets}/p")
        producer = ChannelRouter(endpoint).producer("work", bound=4)
        peer = start("hold", "a", f"ipc://{sockets}/a", "p", endpoint.address)
        endpoint.connect("a", f"ipc://{sockets}/a")
        producer.add_consumer("a")
        call = asyncio.create_task(producer.call("x"))
        assert await peer.says() == "ready"
        assert await peer.says() == "holds x"
        await cancelled(call)
        assert await peer.says() == "cancelled x"
        endpoint.close()

    run(main)
