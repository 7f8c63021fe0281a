"""The producer's end of a channel, without I/O. See `protocol.py` for what the ends say to each
other."""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from channels.errors import BadFrame, Refused
from channels.payload import Undecodable
from channels.protocol import (
    MAX_BATCH_BYTES,
    MAX_BATCH_ITEMS,
    ChannelAnnounce,
    ChannelBatch,
    ChannelCancel,
    ChannelConsumerLeft,
    ChannelHello,
    ChannelOffer,
    ChannelProducerLeft,
    ChannelRecall,
    ChannelSettle,
    ConsumerMessage,
    ItemHead,
    Key,
    Outgoing,
    batches,
    by_reference,
)

MAX_KEYS = 65536  # affinities a producer remembers; the least recently used are forgotten


@dataclass(slots=True, eq=False)
class Pending:
    """An item that was put; once it has ended its payload is let go of. `token` belongs to the shell."""

    sequence: int
    payload: Any
    packed: Any
    size_bytes: int
    key: Key
    priority: int
    token: Any = None
    attempt: int = 0
    holder: str | None = None  # the consumer it is in flight at
    avoid: str | None = None  # the consumer that handed it back
    cancelled: bool = False
    done: bool = False


class Outcome(NamedTuple):
    """How an item ended at its producer. error is None when it was acknowledged with `result`."""

    pending: Pending
    result: Any
    error: Exception | None


@dataclass(slots=True)
class _Link:
    """What a producer knows of a consumer. number 0: no hello yet."""

    number: int = 0
    credit: int = 0
    accepting: bool = True
    told_depth: int = 0
    serial: int = 0
    last_served: int = 0
    num_items: int = 0  # sent, with their bytes
    num_bytes: int = 0
    recalled: bool = False
    in_flight: dict[int, Pending] = field(default_factory=dict)
    cancels: list[int] = field(default_factory=list)


class ProducerProtocol:
    """The producer's side of a channel. Call `flush` after any change and send what it returns.

    pack: makes a payload ready to be sent, and says its size in bytes
    max_batch_bytes: of the payloads of one message; a larger item is one by itself
    """

    def __init__(
        self,
        channel: str,
        bound: int,
        epoch: int = 0,
        pack: Callable[[Any], tuple[Any, int]] = by_reference,
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        if bound < 1:
            raise ValueError(f'channel "{channel}": bound = {bound}, but it must be at least 1')
        self.channel, self.bound, self.epoch = channel, bound, epoch
        self.links: dict[str, _Link] = {}
        self.outcomes: list[Outcome] = []  # for the shell to take
        self.num_pending = 0
        self.num_queued = 0
        self.num_items = 0
        self.size_bytes = 0
        self._pack, self._max_batch_bytes = pack, max_batch_bytes
        self._queue: list[tuple[int, int, Pending]] = []  # a heap; withdrawn items leave it lazily
        self._avoided: Counter[str] = Counter()
        self._affinity: OrderedDict[Key, str] = OrderedDict()
        self._clock = 0
        self._outgoing: list[Outgoing] = []

    def put(self, payload: Any, key: Key = None, priority: int = 0, token: Any = None) -> Pending:
        """Queue an item; the caller sees to it that `num_pending` is below `bound`. Raises what
        `pack` raises."""
        packed, size_bytes = self._pack(payload)
        self.num_items += 1
        pending = Pending(self.num_items, payload, packed, size_bytes, key, priority, token)
        self.num_pending += 1
        self.size_bytes += size_bytes
        self._enqueue(pending)
        return pending

    def cancel(self, pending: Pending, error: Exception) -> bool:
        """Withdraw an item: from the queue, or by telling its consumer. Returns False if it is
        over."""
        if pending.done or pending.cancelled:
            return False
        pending.cancelled = True
        if pending.holder is None:
            self._leave_queue(pending)
            self._finish(pending, None, error)
        else:
            # It keeps its slot until the consumer has let go of it.
            self.outcomes.append(Outcome(pending, None, error))
            self.links[pending.holder].cancels.append(pending.sequence)
        return True

    def items(self) -> Iterator[Pending]:
        """Every item that is queued or in flight and not cancelled."""
        yield from [item for _, _, item in self._queue if not item.done and item.holder is None]
        for link in self.links.values():
            yield from [item for item in link.in_flight.values() if not item.cancelled]

    def add_consumer(self, peer: str) -> None:
        """Hear of a consumer. Idempotent."""
        if peer not in self.links:
            self.links[peer] = _Link()
            self._outgoing.append(
                Outgoing(peer, ChannelAnnounce(channel=self.channel, epoch=self.epoch))
            )

    def remove_consumer(self, peer: str) -> None:
        """A consumer died or is to be served no more: what it holds is queued again, in front."""
        link = self.links.pop(peer, None)
        if link is None:
            return
        if link.number:
            left = ChannelProducerLeft(channel=self.channel, link=link.number)
            self._outgoing.append(Outgoing(peer, left))
        self._take_back(link)
        del self._avoided[peer]
        for _, _, item in self._queue:
            if item.avoid == peer:
                item.avoid = None

    def close(self, error: Exception) -> None:
        """Drop every item, with `error` as its outcome, and leave every link."""
        for pending in list(self.items()):
            self.cancel(pending, error)
        for peer in list(self.links):
            self.remove_consumer(peer)

    def receive(self, peer: str, message: ConsumerMessage, payload: Any) -> None:
        """Take in a message of a consumer. Unknown consumers and old links are ignored."""
        link = self.links.get(peer)
        if link is None:
            return
        if isinstance(message, ChannelHello):
            if message.link != link.number:
                self._take_back(link)
                link = self.links[peer] = _Link(number=message.link)
            link.told_depth = self._depth_for(peer)
            self._offer(peer, link)
        elif isinstance(message, ChannelSettle) and message.link == link.number:
            self._settle(peer, link, message, payload)
        elif isinstance(message, ChannelRecall) and message.link == link.number:
            link.recalled = True
        elif isinstance(message, ChannelConsumerLeft) and message.link == link.number:
            self._take_back(link)
            self.links[peer] = _Link()

    def flush(self) -> list[Outgoing]:
        """What is to be sent now: announcements, cancellations, items where credit is, offers."""
        batches = self._dispatch()
        for peer, link in self.links.items():
            if not link.number:
                continue
            if link.cancels:
                sequences, link.cancels = tuple(link.cancels), []
                cancel = ChannelCancel(channel=self.channel, link=link.number, sequences=sequences)
                self._outgoing.append(Outgoing(peer, cancel))
            items = batches.get(peer)
            if items or link.recalled:
                self._batch(peer, link, items or [])
            depth = self._depth_for(peer)
            if (depth and not link.told_depth) or (link.told_depth and link.credit and not depth):
                # A consumer that thinks wrongly that items wait keeps credit here for them.
                link.told_depth = depth
                self._offer(peer, link)
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    @property
    def num_in_flight(self) -> int:
        """Items at consumers."""
        return sum(len(link.in_flight) for link in self.links.values())

    def _settle(self, peer: str, link: _Link, message: ChannelSettle, payload: Any) -> None:
        results, replacements = payload, None
        if payload is not None and message.handed_back:
            results, replacements = payload
        for values, sequences in ((results, message.acks), (replacements, message.handed_back)):
            if values is not None and len(values) != len(sequences):
                raise BadFrame(f"{len(values)} payloads beside {len(sequences)} items from {peer}")
        link.credit += message.credit
        link.accepting = message.accepting
        for position, sequence in enumerate(message.acks):
            pending = link.in_flight.pop(sequence, None)
            if pending is None:
                continue
            result = results[position] if results else None
            if isinstance(result, Undecodable):
                self._finish(pending, None, result.error)
            else:
                self._finish(pending, result, None)
        for position, sequence in enumerate(message.handed_back):
            pending = link.in_flight.pop(sequence, None)
            if pending is None:
                continue
            replacement = replacements[position] if replacements else None
            if replacement is not None:
                self._replace(pending, replacement[0])
            self._return(pending, avoid=peer)
        for sequence, reason in message.refused:
            pending = link.in_flight.pop(sequence, None)
            if pending is not None:
                self._finish(
                    pending,
                    None,
                    Refused(f'{peer} could not read an item of channel "{self.channel}": {reason}'),
                )

    def _dispatch(self) -> dict[str, list[Pending]]:
        """Give items, the most urgent and oldest first, to consumers with credit."""
        batches: dict[str, list[Pending]] = {}
        ready = {peer: link for peer, link in self.links.items() if link.credit and link.number}
        passed_over: list[tuple[int, int, Pending]] = []
        while ready and self._queue:
            entry = heapq.heappop(self._queue)
            pending = entry[2]
            if pending.done:
                continue
            peer = self._choose(pending, ready)
            if peer is None:
                passed_over.append(entry)
                continue
            self._leave_queue(pending)
            link = ready[peer]
            link.credit -= 1
            self._clock += 1
            link.last_served = self._clock
            link.num_items += 1
            link.num_bytes += pending.size_bytes
            link.in_flight[pending.sequence] = pending
            pending.holder = peer
            pending.attempt += 1
            batches.setdefault(peer, []).append(pending)
            if not link.credit:
                del ready[peer]
            if pending.key is not None:
                self._affinity[pending.key] = peer
                self._affinity.move_to_end(pending.key)
                if len(self._affinity) > MAX_KEYS:
                    self._affinity.popitem(last=False)
        for entry in passed_over:
            heapq.heappush(self._queue, entry)
        return batches

    def _choose(self, pending: Pending, ready: dict[str, _Link]) -> str | None:
        avoid = pending.avoid
        if avoid is not None and not self._has_other(avoid):
            avoid = None
        if pending.key is not None:
            preferred = self._affinity.get(pending.key)
            if preferred in ready and preferred != avoid:
                return preferred
        best: tuple[int, int] | None = None
        chosen = None
        for peer, link in ready.items():  # most credit is least loaded; then take turns
            rank = (link.credit, -link.last_served)
            if peer != avoid and (best is None or rank > best):
                best, chosen = rank, peer
        return chosen

    def _batch(self, peer: str, link: _Link, items: list[Pending]) -> None:
        returned = None
        if link.recalled:
            returned, link.credit, link.recalled = link.credit, 0, False
        depth = link.told_depth = self._depth_for(peer)
        sizes = [item.size_bytes for item in items]
        for part in batches(items, sizes, self._max_batch_bytes):
            link.serial += 1
            batch = ChannelBatch(
                channel=self.channel,
                epoch=self.epoch,
                link=link.number,
                serial=link.serial,
                items=tuple(ItemHead(i.sequence, i.attempt, i.priority, i.key) for i in part),
                depth=depth,
                returned=returned,
            )
            returned = None
            self._outgoing.append(Outgoing(peer, batch, [i.packed for i in part] or None))

    def _offer(self, peer: str, link: _Link) -> None:
        offer = ChannelOffer(
            channel=self.channel, epoch=self.epoch, link=link.number, depth=link.told_depth
        )
        self._outgoing.append(Outgoing(peer, offer))

    def _depth_for(self, peer: str) -> int:
        avoided = self._avoided[peer]
        return self.num_queued - (avoided if avoided and self._has_other(peer) else 0)

    def _has_other(self, peer: str) -> bool:
        return any(
            other != peer and link.number and link.accepting for other, link in self.links.items()
        )

    def _take_back(self, link: _Link) -> None:
        for pending in link.in_flight.values():
            self._return(pending, avoid=None)
        link.in_flight = {}

    def _return(self, pending: Pending, avoid: str | None) -> None:
        pending.holder = None
        if pending.cancelled:
            self._finish(pending, None, None)
        else:
            pending.avoid = avoid
            self._enqueue(pending)

    def _replace(self, pending: Pending, payload: Any) -> None:
        if isinstance(payload, Undecodable):
            return  # the item is worked on again from its first payload
        packed, size_bytes = self._pack(payload)
        self.size_bytes += size_bytes - pending.size_bytes
        pending.payload, pending.packed, pending.size_bytes = payload, packed, size_bytes

    def _enqueue(self, pending: Pending) -> None:
        # By its old sequence number, an item that comes back stands in front of its priority.
        heapq.heappush(self._queue, (-pending.priority, pending.sequence, pending))
        self.num_queued += 1
        if pending.avoid is not None:
            self._avoided[pending.avoid] += 1

    def _leave_queue(self, pending: Pending) -> None:
        self.num_queued -= 1
        if len(self._queue) > 2 * self.num_queued + MAX_BATCH_ITEMS:
            self._queue = [e for e in self._queue if not e[2].done and e[2] is not pending]
            heapq.heapify(self._queue)
        if pending.avoid is not None:
            self._avoided[pending.avoid] -= 1
            pending.avoid = None

    def _finish(self, pending: Pending, result: Any, error: Exception | None) -> None:
        pending.done = True
        # It may stay in the heap until it is reached; shared memory is not to wait for that.
        pending.payload = pending.packed = None
        pending.holder = None
        self.num_pending -= 1
        self.size_bytes -= pending.size_bytes
        self.outcomes.append(Outcome(pending, result, error))
