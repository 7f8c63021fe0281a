"""The consumer's end of a channel, without I/O. See `protocol.py` for what the ends say to each
other."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from channels.errors import BadFrame, ChannelError
from channels.payload import Undecodable
from channels.protocol import (
    MAX_BATCH_BYTES,
    ChannelAnnounce,
    ChannelBatch,
    ChannelCancel,
    ChannelConsumerLeft,
    ChannelHello,
    ChannelOffer,
    ChannelProducerLeft,
    ChannelRecall,
    ChannelSettle,
    Key,
    Outgoing,
    ProducerMessage,
    batches,
    by_reference,
)


@dataclass(slots=True, eq=False)
class Delivery:
    """An item that is held: delivered and not yet finished. `token` belongs to the shell."""

    producer: str
    sequence: int
    attempt: int
    priority: int
    key: Key
    payload: Any
    source: "_Source"
    link: int
    token: Any = None
    taken: bool = False
    cancelled: bool = False
    finished: bool = False


class _Finished(NamedTuple):
    """An item that was acknowledged with a result, or handed back with a replacement; both packed, or None."""

    sequence: int
    packed: Any
    size_bytes: int
    handed_back: bool


@dataclass(slots=True, eq=False)
class _Source:
    """What a consumer knows of a producer, on the present link."""

    peer: str
    link: int
    established: bool = False  # the producer has answered our hello
    outstanding: int = 0  # credit given and not yet used or returned
    depth: int = 0
    serial: int = 0
    recalling: bool = False
    held: dict[int, Delivery] = field(default_factory=dict)
    grant: int = 0
    last_granted: int = 0
    told_accepting: bool = True
    finished: list[_Finished] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)


class ConsumerProtocol:
    """The consumer's side of a channel. Call `flush` after any change and send what it returns.

    capacity: items held at most, counting credit that is given out. incarnation: differs from that
    of any earlier consumer of this name, so that their links are not mistaken for ours. For pack and
    max_batch_bytes see `ProducerProtocol`: here they are about results and replacements.
    """

    def __init__(
        self,
        channel: str,
        capacity: int,
        incarnation: int = 0,
        pack: Callable[[Any], tuple[Any, int]] = by_reference,
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        self.channel = channel
        self.sources: dict[str, _Source] = {}
        self.cancelled: list[
            Delivery
        ] = []  # taken items that became cancelled, for the shell to take
        self.unreadable: list[tuple[str, BadFrame]] = []  # items that were refused, likewise
        self.num_held = 0
        self.num_items = 0
        self._pack, self._max_batch_bytes = pack, max_batch_bytes
        self._capacity = capacity
        self._clock = 0
        self._next_link = incarnation
        self._epochs: dict[str, int] = {}  # the highest seen, also of producers that are gone
        self._ready: list[tuple[int, int, Delivery]] = []  # a heap by priority, then arrival
        self._num_ready = 0
        self._turns: list[_Source] = []
        self._outgoing: list[Outgoing] = []
        self._check_capacity(capacity)

    @property
    def capacity(self) -> int:
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        self._check_capacity(capacity)
        self._capacity = capacity

    @property
    def num_ready(self) -> int:
        """Items delivered and not yet taken."""
        return self._num_ready

    @property
    def num_outstanding(self) -> int:
        """Credit that producers have and did not use."""
        return sum(source.outstanding for source in self._turns)

    def add_producer(self, peer: str) -> None:
        """Hear of a producer. Idempotent."""
        source = self.sources.get(peer)
        if source is None:
            source = self._new_source(peer)
        self._hello(source)

    def remove_producer(self, peer: str) -> None:
        """A producer died or left: what is held of it is cancelled, what was not yet taken
        vanishes."""
        source = self.sources.pop(peer, None)
        if source is not None:
            left = ChannelConsumerLeft(channel=self.channel, link=source.link)
            self._outgoing.append(Outgoing(peer, left))
            self._drop(source)

    def close(self) -> None:
        """Leave every producer; they take back what is held."""
        for peer in list(self.sources):
            self.remove_producer(peer)

    def take(self) -> Delivery | None:
        """The most urgent item that was delivered, or None. It stays held until finished."""
        while self._ready:
            delivery = heapq.heappop(self._ready)[2]
            if not delivery.finished:
                self._num_ready -= 1
                delivery.taken = True
                return delivery
        return None

    def acknowledge(self, delivery: Delivery, result: Any = None) -> None:
        """Finish an item: its slot is free. Raises ChannelError when it was finished before."""
        self._close_item(delivery, result, handed_back=False)

    def hand_back(self, delivery: Delivery, payload: Any = None) -> None:
        """Give an item back to its producer, with a new payload unless None. Errors as for
        acknowledge."""
        self._close_item(delivery, payload, handed_back=True)

    def _close_item(self, delivery: Delivery, payload: Any, *, handed_back: bool) -> None:
        packed, size = (None, 0) if payload is None else self._pack(payload)
        if self._finish(delivery):
            finished = _Finished(delivery.sequence, packed, size, handed_back)
            delivery.source.finished.append(finished)

    def receive(self, peer: str, message: ProducerMessage, payload: Any) -> None:
        """Take in a producer's message. Unknown producers, old epochs and links are ignored."""
        source = self.sources.get(peer)
        if source is None:
            return
        if isinstance(message, ChannelAnnounce):
            if message.epoch < self._epochs.get(peer, message.epoch):
                return
            if source.established:  # the producer forgot our link, or is another one of its name
                self._drop(source)
                source = self._new_source(peer)
            self._epochs[peer] = message.epoch
            self._hello(source)
        elif isinstance(message, ChannelOffer) and message.link == source.link:
            if message.epoch >= self._epochs.get(peer, message.epoch):
                self._epochs[peer] = message.epoch
                source.established = True
                source.depth = message.depth
        elif isinstance(message, ChannelBatch) and message.link == source.link:
            self._deliver(source, message, payload)
        elif isinstance(message, ChannelCancel) and message.link == source.link:
            for sequence in message.sequences:
                delivery = source.held.get(sequence)
                if delivery is not None:
                    self._cancel(delivery)
        elif isinstance(message, ChannelProducerLeft) and message.link == source.link:
            self._drop(source)
            self._new_source(peer)

    def flush(self) -> list[Outgoing]:
        """What is to be sent now: hellos, recalls, then per producer what was finished, with new
        credit."""
        accepting = self._capacity > 0
        self._distribute()
        outgoing, self._outgoing = self._outgoing, []
        for source in self._turns:
            finished = source.finished or source.refused
            news = finished or source.grant or accepting != source.told_accepting
            if news and source.established:
                outgoing += self._settle(source, accepting)
        return outgoing

    def _deliver(self, source: _Source, batch: ChannelBatch, payload: Any) -> None:
        if batch.serial <= source.serial:
            return  # a duplicate on this hop
        payloads = payload if payload is not None else []
        if len(payloads) != len(batch.items):
            raise BadFrame(
                f"{len(payloads)} payloads beside {len(batch.items)} items from {source.peer}"
            )
        source.serial = batch.serial
        source.outstanding -= len(batch.items)
        source.depth = batch.depth
        if batch.returned is not None:
            source.outstanding -= batch.returned
            source.recalling = False
        for head, item in zip(batch.items, payloads, strict=True):
            if isinstance(item, Undecodable):
                source.refused.append((head.sequence, str(item.error)))
                self.unreadable.append((source.peer, item.error))
                continue
            delivery = Delivery(
                source.peer,
                head.sequence,
                head.attempt,
                head.priority,
                head.key,
                item,
                source,
                source.link,
            )
            source.held[head.sequence] = delivery
            self.num_items += 1
            self.num_held += 1
            self._num_ready += 1
            heapq.heappush(self._ready, (-head.priority, self.num_items, delivery))

    def _distribute(self) -> None:
        room = self._capacity - self.num_held - self.num_outstanding
        hungry = [s for s in self._turns if s.established and s.depth > s.outstanding]
        hungry.sort(key=lambda source: source.last_granted)
        while room > 0 and hungry:
            share = max(1, room // len(hungry))
            for source in hungry[:room]:
                credit = min(share, source.depth - source.outstanding, room)
                self._grant(source, credit)
                room -= credit
            hungry = [s for s in hungry if s.depth > s.outstanding]
        if room > 0:
            self._lend(room)
        elif room < 0:
            self._recall(s for s in self._turns if s.outstanding)
        elif hungry:
            self._recall(s for s in self._turns if s.outstanding and not s.depth)

    def _lend(self, room: int) -> None:
        """Lend half the capacity to idle producers; topped up when half of a share is used."""
        idle = [s for s in self._turns if s.established and not s.depth]
        if not idle:
            return
        share = max(1, self._capacity // (2 * len(idle)))
        for source in idle:
            if room > 0 and source.outstanding <= share // 2:
                credit = min(share - source.outstanding, room)
                self._grant(source, credit)
                room -= credit

    def _grant(self, source: _Source, credit: int) -> None:
        self._clock += 1
        source.last_granted = self._clock
        source.outstanding += credit
        source.grant += credit

    def _recall(self, sources: Iterable[_Source]) -> None:
        for source in sources:
            if not source.recalling:
                source.recalling = True
                recall = ChannelRecall(channel=self.channel, link=source.link)
                self._outgoing.append(Outgoing(source.peer, recall))

    def _settle(self, source: _Source, accepting: bool) -> Iterator[Outgoing]:
        finished, source.finished = source.finished, []
        grant, source.grant = source.grant, 0
        refused, source.refused = tuple(source.refused), []
        source.told_accepting = accepting
        sizes = [each.size_bytes for each in finished]
        for part in batches(finished, sizes, self._max_batch_bytes):
            acks = [each for each in part if not each.handed_back]
            back = [each for each in part if each.handed_back]
            message = ChannelSettle(
                channel=self.channel,
                link=source.link,
                credit=grant,
                accepting=accepting,
                acks=tuple(each.sequence for each in acks),
                handed_back=tuple(each.sequence for each in back),
                refused=refused,
            )
            grant, refused = 0, ()
            payload: list[Any] | None = None
            if any(each.packed is not None for each in acks):
                payload = [each.packed for each in acks]
            if back and (payload or any(each.packed is not None for each in back)):
                replaced = [None if each.packed is None else [each.packed] for each in back]
                payload = [payload, replaced]
            yield Outgoing(source.peer, message, payload)

    def _finish(self, delivery: Delivery) -> bool:
        """Free the slot. Returns whether the producer is to be told."""
        if delivery.finished:
            raise ChannelError(
                f'item {delivery.sequence} of {delivery.producer} on channel "{self.channel}" was '
                "finished before: acknowledge or hand back each item once"
            )
        delivery.finished = True
        self.num_held -= 1
        if not delivery.taken:
            self._num_ready -= 1
            if not self._num_ready:
                self._ready.clear()
        return delivery.source.held.pop(delivery.sequence, None) is delivery

    def _cancel(self, delivery: Delivery) -> None:
        delivery.cancelled = True
        if delivery.taken:
            self.cancelled.append(delivery)
        else:
            self.acknowledge(delivery)  # nobody ever sees it

    def _new_source(self, peer: str) -> _Source:
        self._next_link += 1
        source = self.sources[peer] = _Source(peer, self._next_link)
        self._turns.append(source)
        return source

    def _hello(self, source: _Source) -> None:
        hello = ChannelHello(channel=self.channel, link=source.link)
        self._outgoing.append(Outgoing(source.peer, hello))

    def _drop(self, source: _Source) -> None:
        self._turns.remove(source)
        held, source.held = source.held, {}
        for delivery in held.values():
            self._cancel(delivery)

    def _check_capacity(self, capacity: int) -> None:
        if capacity < 0:
            raise ValueError(f'channel "{self.channel}": capacity = {capacity} is negative')
