"""The channel protocol without I/O: cases by hand, and a machine that drives random histories."""

from collections import Counter, deque
from collections.abc import Collection
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

from channels.consuming import ConsumerProtocol, Delivery
from channels.errors import BadFrame, ChannelError, Closed, Refused, Withdrawn
from channels.payload import Undecodable
from channels.producing import Outcome, ProducerProtocol
from channels.protocol import ChannelBatch, ConsumerMessage, ProducerMessage

Frame = tuple[Any, Any]


class Network:
    """First in, first out between each two ends, delivered when asked."""

    def __init__(self) -> None:
        self.producers: dict[str, ProducerProtocol] = {}
        self.consumers: dict[str, ConsumerProtocol] = {}
        self.lines: dict[tuple[str, str], deque[Frame]] = {}

    def flush(self, name: str) -> None:
        end = self.producers.get(name) or self.consumers[name]
        for peer, message, payload in end.flush():
            self.lines.setdefault((name, peer), deque()).append((message, payload))

    def deliver(self, line: tuple[str, str], duplicate: bool = False) -> None:
        """Deliver the oldest message of a line, a batch perhaps twice, and let the receiver answer."""
        message, payload = self.lines[line].popleft()
        source, target = line
        for _ in range(2 if duplicate and isinstance(message, ChannelBatch) else 1):
            if isinstance(message, ProducerMessage) and target in self.consumers:
                self.consumers[target].receive(source, message, payload)
            elif isinstance(message, ConsumerMessage) and target in self.producers:
                self.producers[target].receive(source, message, payload)

    def run(self) -> None:
        """Flush and deliver until nothing moves."""
        for _ in range(10_000):
            for name in [*self.producers, *self.consumers]:
                self.flush(name)
            busy = [line for line, frames in self.lines.items() if frames]
            if not busy:
                return
            for line in busy:
                while self.lines[line]:
                    self.deliver(line)
        raise AssertionError("the protocol never comes to rest")

    def drop_lines(self, name: str) -> None:
        """A process died: what it had not sent out, and what was on its way to it, is lost."""
        for line in list(self.lines):
            if name in line:
                del self.lines[line]


def introduced(capacities: dict[str, int], producers: tuple[str, ...] = ("p",)) -> Network:
    """Producers and consumers that know each other, at rest."""
    network = Network()
    for name in producers:
        network.producers[name] = ProducerProtocol("c", bound=1000)
    for incarnation, (name, capacity) in enumerate(capacities.items()):
        network.consumers[name] = ConsumerProtocol("c", capacity, incarnation * 1000)
        for producer in producers:
            network.producers[producer].add_consumer(name)
            network.consumers[name].add_producer(producer)
    network.run()
    return network


def take_all(consumer: ConsumerProtocol) -> list[Delivery]:
    """Everything that is there to be taken."""
    taken = []
    while (delivery := consumer.take()) is not None:
        taken.append(delivery)
    return taken


def results(producer: ProducerProtocol) -> list[Any]:
    """The results of the outcomes so far, taken."""
    outcomes, producer.outcomes = producer.outcomes, []
    return [outcome.result for outcome in outcomes]


@pytest.mark.parametrize("handed_back", [False, True])
def test_a_message_has_payloads_of_so_many_bytes_or_one(handed_back: bool) -> None:
    """Items that were put at once, and results: in several messages, in their order, and none is left out."""
    sizes = [40, 60, 1, 100, 250, 50, 50, 1, 0, 0]

    def pack(payload: Any) -> tuple[Any, int]:
        return payload, sizes[payload]

    network = Network()
    producer = network.producers["p"] = ProducerProtocol("c", 1000, 0, pack, max_batch_bytes=100)
    consumer = network.consumers["a"] = ConsumerProtocol("c", 50, 1, pack, max_batch_bytes=100)
    producer.add_consumer("a")
    consumer.add_producer("p")
    network.run()
    for number in range(len(sizes)):
        producer.put(number)
    network.flush("p")
    wanted = [[0, 1], [2], [3], [4], [5, 6], [7, 8, 9]]
    line = network.lines["p", "a"]
    assert [payload for message, payload in line if isinstance(message, ChannelBatch)] == wanted
    network.run()
    taken = [consumer.take() for _ in sizes]
    for delivery in taken:
        assert delivery is not None
        if handed_back:
            consumer.hand_back(delivery, delivery.payload)
        else:
            consumer.acknowledge(delivery, delivery.payload)
    network.flush("a")
    payloads = [payload for _, payload in network.lines["a", "p"]]
    if handed_back:
        assert payloads == [[None, [[n] for n in part]] for part in wanted]
    else:
        assert payloads == wanted
        network.run()
        assert [outcome.result for outcome in producer.outcomes] == list(range(len(sizes)))


def test_result_of_the_acknowledgement_reaches_the_producer() -> None:
    """One item there, its result back."""
    network = introduced({"a": 4})
    network.producers["p"].put("question", key="k", priority=2)
    network.run()
    delivery = network.consumers["a"].take()
    assert delivery is not None
    assert (delivery.payload, delivery.key, delivery.priority) == ("question", "k", 2)
    assert (delivery.producer, delivery.attempt) == ("p", 1)
    network.consumers["a"].acknowledge(delivery, "answer")
    network.run()
    assert results(network.producers["p"]) == ["answer"]
    assert network.producers["p"].num_pending == 0


def test_idle_consumer_gets_an_item_in_one_hop() -> None:
    """Credit is lent ahead, so a put is answered by no offer and no grant: one message each way."""
    network = introduced({"a": 4})
    network.producers["p"].put("x")
    network.flush("p")
    assert [type(m).__name__ for m, _ in network.lines["p", "a"]] == ["ChannelBatch"]
    network.deliver(("p", "a"))
    delivery = network.consumers["a"].take()
    assert delivery is not None
    network.consumers["a"].acknowledge(delivery)
    network.flush("a")
    assert len(network.lines["a", "p"]) == 1


def test_capacity_bounds_what_a_consumer_holds() -> None:
    """Ten items, room for three: three come, and one more for each that is finished."""
    network = introduced({"a": 3})
    for number in range(10):
        network.producers["p"].put(number)
    network.run()
    consumer = network.consumers["a"]
    held = take_all(consumer)
    assert [d.payload for d in held] == [0, 1, 2]
    consumer.acknowledge(held[1])
    network.run()
    assert [d.payload for d in take_all(consumer)] == [3]


def test_lent_credit_is_recalled_for_whoever_needs_it() -> None:
    """Capacity 1 lent to one idle producer does not keep another producer's item waiting."""
    network = introduced({"a": 1}, producers=("p", "q"))
    lent_to = next(n for n in ("p", "q") if network.producers[n].links["a"].credit)
    other = "q" if lent_to == "p" else "p"
    network.producers[other].put("x")
    network.run()
    assert [d.payload for d in take_all(network.consumers["a"])] == ["x"]
    assert network.producers[lent_to].links["a"].credit == 0


def test_producers_with_deep_queues_share_a_small_consumer() -> None:
    """Room for one at a time goes to the producers in turn; none starves."""
    network = introduced({"a": 1}, producers=("p", "q", "r"))
    for name in network.producers:
        for _ in range(10):
            network.producers[name].put(name)
    served = []
    for _ in range(12):
        network.run()
        (delivery,) = take_all(network.consumers["a"])
        served.append(delivery.payload)
        network.consumers["a"].acknowledge(delivery)
    assert Counter(served) == {"p": 4, "q": 4, "r": 4}


def test_urgent_item_overtakes_and_equals_keep_their_order() -> None:
    """Priority first, then first in, first out; also among items that already arrived."""
    network = introduced({"a": 1})
    producer = network.producers["p"]
    for payload, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 5), ("e", -1)):
        producer.put(payload, priority=priority)
    order = []
    for _ in range(5):
        network.run()
        (delivery,) = take_all(network.consumers["a"])
        order.append(delivery.payload)
        network.consumers["a"].acknowledge(delivery)
    assert order == ["c", "d", "a", "b", "e"]
    network.consumers["a"].capacity = 3
    network.run()
    producer.put("slow")
    network.run()
    producer.put("urgent", priority=1)
    network.run()
    assert [d.payload for d in take_all(network.consumers["a"])] == ["urgent", "slow"]


def test_key_prefers_the_consumer_that_served_it_while_it_has_room() -> None:
    """The same key goes to the same consumer; when that one is full, to another."""
    network = introduced({"a": 4, "b": 4})
    producer = network.producers["p"]
    homes = []
    for number in range(4):
        producer.put(number, key="episode")
        network.run()
        for name, consumer in network.consumers.items():
            for delivery in take_all(consumer):
                homes.append(name)
                consumer.acknowledge(delivery)
        network.run()
    assert len(set(homes)) == 1
    for number in range(8):
        producer.put(number, key="episode")
    network.run()
    held = {name: take_all(consumer) for name, consumer in network.consumers.items()}
    assert [delivery.payload for delivery in held[homes[0]]][:2] == [0, 1]
    assert [len(items) for items in held.values()] == [4, 4]


def test_items_of_a_removed_consumer_come_first_at_another() -> None:
    """A dead consumer's items are at the front, in their order, with a higher attempt."""
    network = introduced({"a": 2})
    producer = network.producers["p"]
    for number in range(4):
        producer.put(number)
    network.run()
    assert len(take_all(network.consumers["a"])) == 2
    del network.consumers["a"]
    producer.remove_consumer("a")
    consumer = network.consumers["b"] = ConsumerProtocol("c", 10, 5000)
    consumer.add_producer("p")
    producer.add_consumer("b")
    network.run()
    assert [(d.payload, d.attempt) for d in take_all(consumer)] == [(0, 2), (1, 2), (2, 1), (3, 1)]


def test_item_handed_back_goes_to_another_consumer_with_its_new_payload() -> None:
    """Where there is another consumer that takes items, the one that handed it back waits."""
    network = introduced({"a": 1, "b": 1})
    producer = network.producers["p"]
    producer.put("whole")
    network.run()
    first = next(name for name, c in network.consumers.items() if c.num_ready)
    other = "b" if first == "a" else "a"
    for _ in range(3):  # it never bounces back to the one that just gave it up
        (delivery,) = take_all(network.consumers[first])
        network.consumers[first].hand_back(delivery, delivery.payload + "+")
        network.run()
        assert network.consumers[first].num_ready == 0
        first, other = other, first
    (delivery,) = take_all(network.consumers[first])
    assert (delivery.payload, delivery.attempt) == ("whole+++", 4)


def test_item_handed_back_by_the_only_consumer_returns_to_it() -> None:
    """Alone, or beside consumers that take nothing, it gets the item again."""
    network = introduced({"a": 1, "b": 0})
    network.producers["p"].put("x")
    network.run()
    (delivery,) = take_all(network.consumers["a"])
    network.consumers["a"].hand_back(delivery)
    network.run()
    assert [d.attempt for d in take_all(network.consumers["a"])] == [2]


def test_consumer_that_closes_its_capacity_before_handing_back_gets_nothing_more() -> None:
    """A revoked replica: capacity 0, everything back, and it stays empty although it is alone."""
    network = introduced({"a": 4})
    for number in range(6):
        network.producers["p"].put(number)
    network.run()
    consumer = network.consumers["a"]
    held = take_all(consumer)
    consumer.capacity = 0
    for delivery in held:
        consumer.hand_back(delivery)
    network.run()
    assert (consumer.num_held, consumer.num_outstanding) == (0, 0)
    assert network.producers["p"].num_queued == 6
    consumer.capacity = 4
    network.run()
    assert [d.payload for d in take_all(consumer)] == [0, 1, 2, 3]


def test_cancelled_item_in_flight_is_told_and_frees_its_slot_when_finished() -> None:
    """The bound counts it until the consumer lets go; its result goes nowhere."""
    network = introduced({"a": 4})
    producer, consumer = network.producers["p"], network.consumers["a"]
    pending = producer.put("x")
    network.run()
    (delivery,) = take_all(consumer)
    assert producer.cancel(pending, Withdrawn("no longer wanted"))
    assert not producer.cancel(pending, Withdrawn("again"))
    network.run()
    assert consumer.cancelled == [delivery]
    assert producer.num_pending == 1
    consumer.hand_back(delivery)
    network.run()
    assert (producer.num_pending, producer.num_queued) == (0, 0)


def test_cancelled_item_that_was_not_taken_is_never_seen() -> None:
    """Nobody works on what vanished before it was taken."""
    network = introduced({"a": 4})
    producer = network.producers["p"]
    pending = [producer.put(number) for number in range(3)]
    network.run()
    producer.cancel(pending[1], Withdrawn("no longer wanted"))
    network.run()
    assert [d.payload for d in take_all(network.consumers["a"])] == [0, 2]
    assert producer.num_pending == 2


def test_cancelled_items_leave_the_queue_also_when_nobody_consumes() -> None:
    """A producer that puts and cancels for ever holds no memory for it."""
    producer = ProducerProtocol("c", bound=4)
    for _ in range(5000):
        producer.cancel(producer.put("x"), Withdrawn("no longer wanted"))
    assert producer.num_pending == 0
    assert len(producer._queue) < 1000


def test_removed_producer_cancels_what_was_taken_and_hides_the_rest() -> None:
    """Its taken items show cancelled, keep their slot until finished, and are acknowledged to
    nobody."""
    network = introduced({"a": 2})
    for number in range(2):
        network.producers["p"].put(number)
    network.run()
    consumer = network.consumers["a"]
    taken = consumer.take()
    assert taken is not None
    consumer.remove_producer("p")
    assert consumer.cancelled == [taken]
    assert consumer.take() is None
    assert consumer.num_held == 1
    consumer.acknowledge(taken)
    assert consumer.num_held == 0
    network.run()
    assert network.producers["p"].num_queued == 2


def test_restarted_producer_replaces_its_older_self_without_being_removed() -> None:
    """A higher epoch cancels what the lower one delivered; late words of the lower one are ignored."""
    network = introduced({"a": 4})
    old = network.producers["p"]
    old.put("old")
    network.run()
    (delivery,) = take_all(network.consumers["a"])
    new = ProducerProtocol("c", bound=10, epoch=1)
    network.producers["p"] = new
    new.add_consumer("a")
    new.put("new")
    network.run()
    consumer = network.consumers["a"]
    assert delivery.cancelled
    assert [d.payload for d in take_all(consumer)] == ["new"]
    old.remove_consumer("a")
    old.add_consumer("a")
    for _, message, payload in old.flush():
        assert isinstance(message, ProducerMessage)
        consumer.receive("p", message, payload)
    assert not consumer.cancelled[1:]


def test_restarted_consumer_gets_the_items_of_its_older_self() -> None:
    """A hello with a new number tells that the consumer forgot, even before anybody noticed its
    death."""
    network = introduced({"a": 4})
    network.producers["p"].put("x")
    network.run()
    assert len(take_all(network.consumers["a"])) == 1
    again = network.consumers["a"] = ConsumerProtocol("c", 4, 999_999)
    again.add_producer("p")
    network.run()
    assert [(d.payload, d.attempt) for d in take_all(again)] == [("x", 2)]


def test_item_that_cannot_be_read_is_refused_and_does_not_harm_its_neighbours() -> None:
    """The caller learns why; the consumer learns that it happened; the batch's other items arrive."""
    network = introduced({"a": 4})
    producer, consumer = network.producers["p"], network.consumers["a"]
    producer.put("fine")
    producer.put(Undecodable(BadFrame("no torch here")))
    network.run()
    assert [d.payload for d in take_all(consumer)] == ["fine"]
    assert [peer for peer, _ in consumer.unreadable] == ["p"]
    (outcome,) = producer.outcomes
    assert isinstance(outcome.error, Refused)
    assert "no torch here" in str(outcome.error)


def test_item_is_finished_once() -> None:
    """The second acknowledgement is an error of the consumer, and says so."""
    network = introduced({"a": 4})
    network.producers["p"].put("x")
    network.run()
    (delivery,) = take_all(network.consumers["a"])
    network.consumers["a"].acknowledge(delivery)
    with pytest.raises(ChannelError, match="finished before"):
        network.consumers["a"].hand_back(delivery)


def test_closed_producer_drops_everything_and_tells_its_consumers() -> None:
    """Queued items end with Closed; what a consumer works on shows cancelled."""
    network = introduced({"a": 1})
    producer = network.producers["p"]
    producer.put("taken")
    producer.put("queued")
    network.run()
    (delivery,) = take_all(network.consumers["a"])
    producer.close(Closed("over"))
    network.run()
    assert [str(outcome.error) for outcome in producer.outcomes if outcome.error] == ["over"] * 2
    assert delivery.cancelled
    assert producer.num_pending == 0


def test_large_queue_leaves_in_batches_of_bounded_length() -> None:
    """A thousand items for a consumer with room for all of them are several messages."""
    network = introduced({"a": 2000})
    for number in range(1000):
        network.producers["p"].put(number)
    network.run()
    assert [d.payload for d in take_all(network.consumers["a"])] == list(range(1000))


PRODUCERS = ("p", "q")
CONSUMERS = ("a", "b", "c")
WEIGHTS = {
    "put": 4,
    "flush": 4,
    "deliver": 5,
    "take": 3,
    "finish": 3,
    "hear": 2,
    "rest": 3,
    "resize": 1,
    "cancel": 1,
    "accident": 1,
}


class Histories(RuleBasedStateMachine):
    """Random puts, takes, acknowledgements, hand-backs, cancellations, crashes and joins.

    A crash loses the process and what was on its lines; the others hear of it, and of the
    successor, later and in any order. In the end all meet again and work everything off.
    """

    @initialize(capacities=st.lists(st.integers(0, 3), min_size=3, max_size=3), early=st.booleans())
    def begin(self, capacities: list[int], early: bool) -> None:
        self.network = Network()
        self.news: deque[tuple[str, str, str]] = deque()  # (who hears, what, of whom)
        self.epoch = Counter[str]()
        self.incarnation = 0
        self.next_item = 0
        self.accidents = 0
        self.seen: set[tuple[int, int]] = set()  # (item, attempt) that were taken
        self.handed_back = Counter[int]()
        self.open: dict[str, dict[int, Any]] = {}  # producer → item → pending, not ended
        self.acknowledged = Counter[int]()
        self.cancelled: set[int] = set()
        self.taken: dict[str, list[Delivery]] = {}
        self.order: dict[tuple[int, str, int], int] = {}
        self.limit: dict[str, int] = {}
        for name in PRODUCERS:
            self.start_producer(name)
        for name, capacity in zip(CONSUMERS, capacities, strict=True):
            self.start_consumer(name, capacity)
        while early and self.news:  # otherwise they hear of each other in the course of events
            self.tell(0)
        if early:
            self.network.run()

    # One rule with weights: were each act a rule, most histories would lack puts or deliveries.
    @rule(seed=st.integers(0, 2**64 - 1))
    def act(self, seed: int) -> None:
        random = Random(seed)
        (act,) = random.choices(list(WEIGHTS), list(WEIGHTS.values()))
        getattr(self, act)(random)
        self.check()

    def put(self, random: Random) -> None:
        producer = random.choice(PRODUCERS)
        end = self.network.producers[producer]
        for priority in random.choices(range(3), k=random.randint(1, 4)):
            if end.num_pending < end.bound:
                item = self.next_item = self.next_item + 1
                self.open[producer][item] = end.put(
                    item, key=[None, "k", 1][item % 3], priority=priority, token=item
                )

    def flush(self, random: Random) -> None:
        for name in random.choices(PRODUCERS + CONSUMERS, k=random.randint(1, 5)):
            self.network.flush(name)

    def deliver(self, random: Random) -> None:
        for _ in range(random.randint(1, 12)):
            busy = sorted(line for line, frames in self.network.lines.items() if frames)
            if busy:
                self.network.deliver(random.choice(busy), duplicate=random.random() < 0.2)
                self.check()

    def take(self, random: Random) -> None:
        for name in CONSUMERS:
            for _ in range(random.randint(0, 3)):
                self.take_one(name)

    def finish(self, random: Random) -> None:
        consumer = random.choice(CONSUMERS)
        held = self.taken[consumer]
        for _ in range(random.randint(1, 4)):
            if held:
                delivery = held.pop(random.randrange(len(held)))
                if random.random() < 0.2:
                    self.handed_back[delivery.payload] += 1
                    self.network.consumers[consumer].hand_back(delivery)
                else:
                    self.acknowledge(consumer, delivery)

    def hear(self, random: Random) -> None:
        for _ in range(random.randint(1, 8)):
            if self.news:
                self.tell(random.randrange(len(self.news)))

    def rest(self, random: Random) -> None:
        self.network.run()

    def resize(self, random: Random) -> None:
        consumer, capacity = random.choice(CONSUMERS), random.choice([0, 1, 1, 2, 5])
        self.network.consumers[consumer].capacity = capacity
        self.limit[consumer] = max(self.limit[consumer], capacity)

    def cancel(self, random: Random) -> None:
        producer = random.choice(PRODUCERS)
        items = sorted(self.open[producer])
        if items:
            item = random.choice(items)
            pending = self.open[producer][item]
            if self.network.producers[producer].cancel(pending, Withdrawn("test")):
                self.cancelled.add(item)

    def accident(self, random: Random) -> None:
        """A process dies, or a living pair is parted by mistake and meets again."""
        what = random.choice(["crash consumer", "crash producer", "part"])
        producer, consumer = random.choice(PRODUCERS), random.choice(CONSUMERS)
        self.accidents += 1
        if what == "part":
            for who, of in ((producer, consumer), (consumer, producer)):
                self.news += [(who, "remove", of), (who, "add", of)]
            return
        dead, peers = (consumer, PRODUCERS) if what == "crash consumer" else (producer, CONSUMERS)
        self.network.drop_lines(dead)
        self.news = deque(n for n in self.news if n[0] != dead)
        if random.random() < 0.5:  # otherwise they find out from its successor
            self.news += [(peer, "remove", dead) for peer in peers]
        if dead == consumer:
            self.start_consumer(consumer, random.randint(1, 5))
        else:
            self.start_producer(producer)

    def start_producer(self, name: str) -> None:
        self.network.producers[name] = ProducerProtocol("c", 20, epoch=self.epoch[name])
        self.epoch[name] += 1
        self.open[name] = {}
        self.meet(name, CONSUMERS, self.network.consumers)

    def start_consumer(self, name: str, capacity: int) -> None:
        self.incarnation += 1_000_000
        self.network.consumers[name] = ConsumerProtocol("c", capacity, self.incarnation)
        self.taken[name] = []
        self.limit[name] = capacity
        self.meet(name, PRODUCERS, self.network.producers)

    def meet(self, name: str, peers: tuple[str, ...], alive: Collection[str]) -> None:
        for peer in peers:
            if peer in alive:
                self.news += [(name, "add", peer), (peer, "add", name)]

    def tell(self, position: int) -> None:
        """Pass on one piece of news; news for one end of one peer stay in order."""
        who, _, of = self.news[position]
        first = next(i for i, (w, _, o) in enumerate(self.news) if (w, o) == (who, of))
        what = self.news[first][1]
        del self.news[first]
        if who in self.network.producers:
            producer = self.network.producers[who]
            (producer.add_consumer if what == "add" else producer.remove_consumer)(of)
        else:
            consumer = self.network.consumers[who]
            (consumer.add_producer if what == "add" else consumer.remove_producer)(of)

    def take_one(self, consumer: str) -> None:
        delivery = self.network.consumers[consumer].take()
        if delivery is None:
            return
        self.taken[consumer].append(delivery)
        item = delivery.payload
        assert (item, delivery.attempt) not in self.seen, "one delivery was taken twice"
        self.seen.add((item, delivery.attempt))
        # Without an accident nothing comes twice but what was handed back.
        assert delivery.attempt <= 1 + self.handed_back[item] or self.accidents
        key = (delivery.link, consumer, delivery.priority)
        if delivery.attempt == 1:
            assert delivery.sequence > self.order.get(key, 0), "out of order"
            self.order[key] = delivery.sequence

    def acknowledge(self, consumer: str, delivery: Delivery) -> None:
        self.acknowledged[delivery.payload] += 1
        assert self.acknowledged[delivery.payload] == 1 or self.accidents, "worked off twice"
        self.network.consumers[consumer].acknowledge(delivery, delivery.payload)

    def check(self) -> None:
        """Bounds hold at any time, and an item ends once, with the result it was acknowledged with."""
        for name, consumer in self.network.consumers.items():
            assert consumer.num_held + consumer.num_outstanding <= self.limit[name]
            for peer, source in consumer.sources.items():
                link = self.network.producers[peer].links.get(name)
                if link is not None and link.number == source.link:
                    assert 0 <= link.credit <= source.outstanding
        for name, producer in self.network.producers.items():
            assert producer.num_pending <= producer.bound
            assert producer.num_queued + producer.num_in_flight == producer.num_pending
            outcomes, producer.outcomes = producer.outcomes, []
            for outcome in outcomes:
                self.end(name, outcome)

    def end(self, producer: str, outcome: Outcome) -> None:
        item = outcome.pending.token  # the payload is let go of
        if item in self.cancelled:
            self.open[producer].pop(item, None)
            return
        assert outcome.error is None
        assert outcome.result == item
        assert self.acknowledged[item] >= 1, "ended without having been acknowledged"
        del self.open[producer][item]  # KeyError: ended twice

    def teardown(self) -> None:
        while self.news:
            self.tell(0)
        # In the end one consumer serves all, with room for one item: nothing may be stuck with others.
        for name, consumer in self.network.consumers.items():
            consumer.capacity = 1 if name == "a" else 0
            self.limit[name] = max(1, self.limit[name])
        for _ in range(200):
            self.network.run()
            self.check()
            for name in CONSUMERS:
                self.take_one(name)
                for delivery in self.taken[name]:
                    self.acknowledge(name, delivery)
                self.taken[name] = []
            if not any(p.num_pending for p in self.network.producers.values()):
                break
        self.network.run()
        self.check()
        assert not any(self.open.values()), "lost"
        for name, consumer in self.network.consumers.items():
            assert consumer.num_held == 0, name
            assert consumer.num_outstanding == sum(
                producer.links[name].credit for producer in self.network.producers.values()
            ), "credit leaked"


@pytest.mark.parametrize(
    "examples",
    [100, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])],
)
def test_random_histories_lose_and_double_nothing(examples: int) -> None:
    """See `Histories`."""
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=examples, stateful_step_count=80, deadline=None)
    )
