"""Channels between actors: bounded, pulled by credit, acknowledged. The asyncio shell of
`protocol.py`.

    producer = ChannelRouter(endpoint).producer("requests", bound=1024)
    producer.add_consumer("job/rollout-0")
    actions = await producer.call(turn, key=episode)

    consumer = ChannelRouter(endpoint).consumer("requests", capacity=64)
    consumer.add_producer("job/env-0")
    item = await consumer.get()
    item.ack(actions)

Contract:

* Order: items of one producer and one priority reach a consumer in the order they were put. A more
  urgent (higher) priority overtakes whatever still waits, at the producer and at the consumer.
  Nothing is promised across producers, or across consumers of one producer.
* Loss: an item is its producer's until it is acknowledged. When its consumer is removed (it died)
  or hands it back, it is queued again at the front of its priority and goes to another: delivery is
  at least once, and `attempt` counts deliveries. When the producer dies or is removed its items are
  gone: those already taken show `cancelled`, the others vanish. Durability is the ledger's
  business.
* Duplicates: none on a hop. After a consumer was removed by mistake two may work on one item; only
  the acknowledgement of the one that holds it now counts.
* Backpressure: `put` waits, first come first served, while `bound` items, or `bound_bytes`, are put
  and not acknowledged. An item's size is known once it is packed, so a producer holds less than
  `bound_bytes` and one item. A consumer never holds more than `capacity` items (delivered, not
  finished), so the faster consumer takes more. Every item taken must be finished, by `ack` or
  `hand_back`, cancelled ones too: that frees its slot.
* Keys are a preference: an item goes to the consumer that last took its key, if that one has room.
* Introductions are by name, in any order and any time; connect the endpoint first. They are
  idempotent.
* Payloads must not be changed after they were given to the channel.

In the loop's thread only. What is done in one turn of the loop leaves in as few messages as
possible, at its end.
"""

import asyncio
import heapq
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from channels.consuming import ConsumerProtocol, Delivery
from channels.endpoint import Endpoint, OnMessage, unhandled
from channels.errors import Closed, PeerLost, Withdrawn
from channels.messages import Message
from channels.producing import Pending, ProducerProtocol
from channels.protocol import (
    MAX_BATCH_BYTES,
    ConsumerMessage,
    Key,
    Outgoing,
    ProducerMessage,
)
from channels.sizes import size_bytes

BOUND_BYTES = 1 << 30  # put and not acknowledged

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """One end of a channel, now.

    depth: items that wait at this end (not in flight; not yet taken)   bound: its bound or capacity
    in_flight: items at consumers, or taken and not finished   waiters: tasks that wait in put or
    get
    items: items so far   size_bytes: of all unacknowledged items, and its bound (producers only)
    peers: introduced peers
    """

    channel: str
    depth: int
    bound: int
    in_flight: int
    waiters: int
    items: int
    size_bytes: int
    bound_bytes: int
    peers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeStatistics:
    """What goes from a producer to one of its consumers, now.

    in_flight: items there   credit: items more that may leave at once
    items, size_bytes: sent since the two met, which they do again when one of them restarts
    """

    consumer: str
    in_flight: int
    credit: int
    items: int
    size_bytes: int


class ChannelRouter:
    """The channels of one endpoint. Messages that belong to no channel go to `on_message`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.on_message: OnMessage = unhandled
        self.producers: dict[str, Producer] = {}
        self.consumers: dict[str, Consumer] = {}
        self._loop = asyncio.get_running_loop()
        self._max_batch_bytes = min(endpoint.max_payload_bytes, MAX_BATCH_BYTES)
        endpoint.on_message = self._received

    def producer(
        self, channel: str, *, bound: int, bound_bytes: int = BOUND_BYTES, epoch: int = 0
    ) -> "Producer":
        """This endpoint's producer of a channel. epoch: higher than that of any earlier one of this
        name."""
        if channel in self.producers:
            raise ValueError(
                f'{self.endpoint.name} already produces channel "{channel}": use that one'
            )
        producer = self.producers[channel] = Producer(self, channel, bound, bound_bytes, epoch)
        return producer

    def consumer(self, channel: str, *, capacity: int) -> "Consumer":
        """This endpoint's consumer of a channel."""
        if channel in self.consumers:
            raise ValueError(
                f'{self.endpoint.name} already consumes channel "{channel}": use that one'
            )
        consumer = self.consumers[channel] = Consumer(self, channel, capacity)
        return consumer

    def remove_peer(self, peer: str) -> None:
        """A peer died: remove it from every channel. Its items here are cancelled, ours go to
        others."""
        for producer in self.producers.values():
            producer.remove_consumer(peer)
        for consumer in self.consumers.values():
            consumer.remove_producer(peer)

    def close(self) -> None:
        """Close every channel. The endpoint stays open."""
        for producer in list(self.producers.values()):
            producer.close()
        for consumer in list(self.consumers.values()):
            consumer.close()

    def _received(self, sender: str, message: Message, payload: Any) -> None:
        if isinstance(message, ProducerMessage):
            consumer = self.consumers.get(message.channel)
            if consumer is not None:
                consumer._received(sender, message, payload)
        elif isinstance(message, ConsumerMessage):
            producer = self.producers.get(message.channel)
            if producer is not None:
                producer._received(sender, message, payload)
        else:
            self.on_message(sender, message, payload)

    def _pack(self, payload: Any) -> tuple[Any, int]:
        packed = self.endpoint.pack(payload)
        return packed, size_bytes(packed)

    def _send(self, outgoing: list[Outgoing]) -> None:
        for peer, message, payload in outgoing:
            try:
                self.endpoint.send(peer, message, payload)
            except (PeerLost, Closed):
                # Whoever disconnects a peer also removes it, which takes back what was lost here.
                log.debug("not sent peer=%s message=%r: not connected", peer, message)


class _Flushing:
    """Sends what an end has to say at the end of the loop's turn."""

    def __init__(self, router: ChannelRouter, flush: Callable[[], list[Outgoing]]) -> None:
        self._router = router
        self._flush = flush
        self._scheduled = False

    def soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._router._loop.call_soon(self.now)

    def now(self) -> None:
        self._scheduled = False
        self._router._send(self._flush())


class Producer:
    """Puts items into a channel. Made by `ChannelRouter.producer`; see the module docstring."""

    def __init__(
        self, router: ChannelRouter, channel: str, bound: int, bound_bytes: int, epoch: int
    ) -> None:
        if bound_bytes < 1:
            raise ValueError(
                f'channel "{channel}": bound_bytes = {bound_bytes}, but it must be at least 1'
            )
        self.channel = channel
        self.bound_bytes = bound_bytes
        self._router = router
        self._protocol = ProducerProtocol(
            channel, bound, epoch, router._pack, router._max_batch_bytes
        )
        self._flushing = _Flushing(router, self._protocol.flush)
        # A heap by who came first: one that was woken and finds the bytes taken goes back to its place.
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._last_waiter = 0
        self._reserved = 0  # slots given to waiters that did not run yet
        self._drained = asyncio.Event()
        self._drained.set()
        self._closed = False

    async def put(self, payload: Any, key: Key = None, priority: int = 0) -> None:
        """Queue an item, waiting while a bound is reached.

        Raises Closed, TypeError for a payload that cannot travel, TooLarge.
        """
        await self._slot()
        self._put(payload, key, priority, None)

    async def call(self, payload: Any, key: Key = None, priority: int = 0) -> Any:
        """Put an item and wait for the result that its consumer acknowledges it with.

        Cancelling withdraws the item, or tells its consumer. Raises as `put`; Withdrawn after
        `cancel`; Refused when the consumer cannot read the item, BadFrame when we cannot read the
        result.
        """
        await self._slot()
        reply: asyncio.Future[Any] = self._router._loop.create_future()
        pending = self._put(payload, key, priority, reply)
        try:
            return await reply
        except asyncio.CancelledError as error:
            if self._protocol.cancel(pending, Withdrawn(str(error))):
                self._changed()
            raise

    def add_consumer(self, peer: str) -> None:
        """Hear of a consumer; the endpoint is connected to it."""
        if not self._closed:
            self._protocol.add_consumer(peer)
            self._changed()

    def remove_consumer(self, peer: str) -> None:
        """A consumer died or left: its items go to others."""
        self._protocol.remove_consumer(peer)
        self._changed()

    def cancel(self, predicate: Callable[[Pending], bool]) -> int:
        """Withdraw the items for which the predicate (of `payload`, `key`, `priority`) holds.

        What is in flight keeps its place under the bound until its consumer lets go of it. Returns
        how many.
        """
        chosen = [pending for pending in self._protocol.items() if predicate(pending)]
        for pending in chosen:
            self._protocol.cancel(
                pending,
                Withdrawn(f'the item was cancelled by its producer of channel "{self.channel}"'),
            )
        self._changed()
        return len(chosen)

    async def drained(self) -> None:
        """Wait until every item that was put is acknowledged or cancelled."""
        await self._drained.wait()

    def close(self) -> None:
        """Drop what is not acknowledged (wait for `drained` first to keep it); callers and waiters
        get Closed."""
        if self._closed:
            return
        self._closed = True
        self._router.producers.pop(self.channel, None)
        error = Closed(f'the producer of channel "{self.channel}" was closed')
        self._protocol.close(error)
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._waiters.clear()
        self._changed()
        self._flushing.now()

    def statistics(self) -> ChannelStatistics:
        """What waits and what is in flight."""
        protocol = self._protocol
        return ChannelStatistics(
            channel=self.channel,
            depth=protocol.num_queued,
            bound=protocol.bound,
            in_flight=protocol.num_in_flight,
            waiters=len(self._waiters),
            items=protocol.num_items,
            size_bytes=protocol.size_bytes,
            bound_bytes=self.bound_bytes,
            peers=len(protocol.links),
        )

    def edges(self) -> list[EdgeStatistics]:
        """One for each consumer that was introduced."""
        return [
            EdgeStatistics(
                consumer=peer,
                in_flight=len(link.in_flight),
                credit=link.credit,
                items=link.num_items,
                size_bytes=link.num_bytes,
            )
            for peer, link in self._protocol.links.items()
        ]

    async def _slot(self) -> None:
        """Wait for a place under the bounds; the caller puts before it awaits anything."""
        if self._closed:
            raise Closed(f'the producer of channel "{self.channel}" is closed')
        if not self._waiters and not self._reserved and self._has_room():
            return
        self._last_waiter = number = self._last_waiter + 1
        while True:
            waiter: asyncio.Future[None] = self._router._loop.create_future()
            heapq.heappush(self._waiters, (number, waiter))
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                    self._reserved -= 1  # the slot was given to us just before
                    self._wake_waiters()
                elif (number, waiter) in self._waiters:
                    self._waiters.remove((number, waiter))
                    heapq.heapify(self._waiters)
                raise
            self._reserved -= 1
            if self._closed:
                raise Closed(f'the producer of channel "{self.channel}" was closed')
            if self._protocol.size_bytes < self.bound_bytes:
                return  # those that were woken before us may have put more than was free

    def _put(
        self, payload: Any, key: Key, priority: int, reply: "asyncio.Future[Any] | None"
    ) -> Pending:
        try:
            pending = self._protocol.put(payload, key, priority, reply)
        finally:
            self._changed()  # also when refused: the slot that was kept for it is free
        return pending

    def _received(self, sender: str, message: ConsumerMessage, payload: Any) -> None:
        try:
            self._protocol.receive(sender, message, payload)
        finally:
            self._changed()

    def _changed(self) -> None:
        outcomes, self._protocol.outcomes = self._protocol.outcomes, []
        for pending, result, error in outcomes:
            reply = pending.token
            if reply is not None and not reply.done():
                if error is None:
                    reply.set_result(result)
                else:
                    reply.set_exception(error)
            elif reply is None and error is not None and not pending.cancelled:
                log.error(
                    "item dropped channel=%s sequence=%d: %s", self.channel, pending.sequence, error
                )
        self._wake_waiters()
        if self._protocol.num_pending:
            self._drained.clear()
        else:
            self._drained.set()
        self._flushing.soon()

    def _has_room(self) -> bool:
        protocol = self._protocol
        return (
            protocol.num_pending + self._reserved < protocol.bound
            and protocol.size_bytes < self.bound_bytes
        )

    def _wake_waiters(self) -> None:
        while self._waiters and self._has_room():
            _, waiter = heapq.heappop(self._waiters)
            if not waiter.done():
                self._reserved += 1
                waiter.set_result(None)


class Item:
    """An item that a consumer took. Finish it once, by `ack` or `hand_back`."""

    __slots__ = ("_consumer", "_delivery")

    def __init__(self, consumer: "Consumer", delivery: Delivery) -> None:
        self._consumer = consumer
        # It does not refer back to us: in a cycle, payloads would wait for the garbage collector.
        self._delivery = delivery

    @property
    def payload(self) -> Any:
        return self._delivery.payload

    @property
    def key(self) -> Key:
        return self._delivery.key

    @property
    def priority(self) -> int:
        return self._delivery.priority

    @property
    def producer(self) -> str:
        """The name of the endpoint it came from."""
        return self._delivery.producer

    @property
    def attempt(self) -> int:
        """How often it was delivered, this time included."""
        return self._delivery.attempt

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it: its producer withdrew it, died, or gave it to another."""
        return self._delivery.cancelled

    @property
    def finished(self) -> bool:
        """It was acknowledged or handed back."""
        return self._delivery.finished

    async def wait_cancelled(self) -> None:
        """Return once the item is cancelled."""
        if self._delivery.token is None:
            self._delivery.token = asyncio.Event()
            if self.cancelled:
                self._delivery.token.set()
        await self._delivery.token.wait()

    def ack(self, result: Any = None) -> None:
        """The item is done; `result` goes to the caller.

        Raises ChannelError when finished before, TypeError for a result that cannot travel (the item is then not
        finished).
        """
        self._consumer._protocol.acknowledge(self._delivery, result)
        self._consumer._changed()

    def hand_back(self, payload: Any = None) -> None:
        """Give it back to the producer's front, with a new payload unless None.

        Another consumer gets it, if there is one that takes items. Raises as `ack`.
        """
        self._consumer._protocol.hand_back(self._delivery, payload)
        self._consumer._changed()

    def __repr__(self) -> str:
        delivery = self._delivery
        state = "finished" if delivery.finished else "cancelled" if delivery.cancelled else "held"
        return f"<Item {delivery.sequence} of {delivery.producer} #{delivery.attempt} {state}>"


class Consumer:
    """Takes items from a channel. Made by `ChannelRouter.consumer`; see the module docstring."""

    def __init__(self, router: ChannelRouter, channel: str, capacity: int) -> None:
        self.channel = channel
        self._router = router
        self._protocol = ConsumerProtocol(
            channel,
            capacity,
            secrets.randbits(62),
            router._pack,
            router._max_batch_bytes,
        )
        self._flushing = _Flushing(router, self._protocol.flush)
        self._getters: deque[asyncio.Future[None]] = deque()
        self._errors: deque[Exception] = deque()
        self._closed = False

    @property
    def capacity(self) -> int:
        """Items held at most: delivered and not finished. May be set at any time; 0 takes nothing
        more.

        When it is lowered, what was delivered stays, and what is on its way still comes.
        """
        return self._protocol.capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        self._protocol.capacity = capacity
        self._changed()

    async def get(self) -> Item:
        """The most urgent item, waiting for one. Cancelling loses nothing.

        Raises Closed; BadFrame, once, for an item that came and could not be read: its caller gets
        Refused.
        """
        while True:
            item = self.get_nowait()
            if item is not None:
                return item
            getter: asyncio.Future[None] = self._router._loop.create_future()
            self._getters.append(getter)
            try:
                await getter
            except asyncio.CancelledError:
                if getter.done() and not getter.cancelled():
                    self._wake_getters()  # pass on the wake-up that we do not use
                elif getter in self._getters:
                    self._getters.remove(getter)
                raise

    def get_nowait(self) -> Item | None:
        """The most urgent item that is here, or None. Raises as `get`."""
        if self._closed:
            raise Closed(f'the consumer of channel "{self.channel}" is closed')
        if self._errors:
            raise self._errors.popleft()
        delivery = self._protocol.take()
        return None if delivery is None else Item(self, delivery)

    def add_producer(self, peer: str) -> None:
        """Hear of a producer; the endpoint is connected to it."""
        if not self._closed:
            self._protocol.add_producer(peer)
            self._changed()

    def remove_producer(self, peer: str) -> None:
        """A producer died or left: its items here become cancelled, those not yet taken vanish."""
        self._protocol.remove_producer(peer)
        self._changed()

    def close(self) -> None:
        """Leave the channel: producers take back what is held, waiting `get`s raise Closed."""
        if self._closed:
            return
        self._closed = True
        self._router.consumers.pop(self.channel, None)
        self._protocol.capacity = 0
        self._flushing.now()  # what was finished or handed back is said before the farewell
        self._protocol.close()
        self._changed()
        self._flushing.now()

    def statistics(self) -> ChannelStatistics:
        """What waits to be taken and what is held."""
        protocol = self._protocol
        return ChannelStatistics(
            channel=self.channel,
            depth=protocol.num_ready,
            bound=protocol.capacity,
            in_flight=protocol.num_held - protocol.num_ready,
            waiters=len(self._getters),
            items=protocol.num_items,
            size_bytes=0,
            bound_bytes=0,
            peers=len(protocol.sources),
        )

    def _received(self, sender: str, message: ProducerMessage, payload: Any) -> None:
        try:
            self._protocol.receive(sender, message, payload)
        finally:
            self._changed()

    def _changed(self) -> None:
        protocol = self._protocol
        if protocol.cancelled:
            cancelled, protocol.cancelled = protocol.cancelled, []
            for delivery in cancelled:
                if delivery.token is not None:
                    delivery.token.set()
        if protocol.unreadable:
            unreadable, protocol.unreadable = protocol.unreadable, []
            self._errors.extend(error for _, error in unreadable)
        self._wake_getters()
        self._flushing.soon()

    def _wake_getters(self) -> None:
        ready = len(self._getters) if self._closed else self._protocol.num_ready + len(self._errors)
        while self._getters and ready > 0:
            getter = self._getters.popleft()
            if not getter.done():
                ready -= 1
                getter.set_result(None)
