"""The channel protocol: what its ends say to each other, and why it cannot lose, double or get
stuck.

The ends are `producing.py` and `consuming.py`, plain state machines without I/O: messages in,
messages out.

A channel has a name, any number of producers and any number of consumers. Each pair that was
introduced to each other has a link, numbered by the consumer, on which the two talk:

    producer                                  consumer
       │ ◀──────────────── ChannelHello(link) ── │   "this is how I name our link"
       │ ── ChannelOffer(depth) ───────────────▶ │   "so many items wait"
       │ ◀──────────── ChannelSettle(credit=n) ─ │   "send n"; also carries what was acknowledged
       │ ── ChannelBatch(items, depth) ────────▶ │   at most as many items as there is credit
       │ ◀──────────────────── ChannelRecall ─── │   "return unused credit", answered by a batch

Credit: a consumer holds items (delivered, not yet acknowledged) and has given out credit. The sum
is never above its capacity. Room goes to producers with waiting items first, in equal shares; part
of what is left is lent to idle producers, so that their next item leaves at once, one way, without
an offer. Lent credit cannot get stuck: when others need it, it is recalled.

Introduction: whichever side hears of the other last starts the link (the producer by
ChannelAnnounce, the consumer by ChannelHello). A new link ends the old one: the producer takes back
what was in flight on it, and what the consumer still holds of it counts as cancelled. Messages of
other links are ignored, so nothing late can be mistaken, and a batch whose serial was seen is a
duplicate and is dropped.

The message classes are wire format: see `channels/messages.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from channels.messages import Message

MAX_BATCH_ITEMS = 256  # in one message
# Of payloads in one message, unless it is one item: the first of a batch is not seen before the last is there.
MAX_BATCH_BYTES = 16 << 20

Key = str | int | None
T = TypeVar("T")


def by_reference(payload: Any) -> tuple[Any, int]:
    """The `pack` of ends in one process: the payload itself, its size unknown."""
    return payload, 0


def batches(items: Sequence[T], sizes: Sequence[int], max_bytes: int) -> Iterator[Sequence[T]]:
    """Split items into what may be one message each, in order; where there are none, into one of none."""
    start, total = 0, 0
    for end, size in enumerate(sizes):
        total += size
        if end > start and (end - start >= MAX_BATCH_ITEMS or total > max_bytes):
            yield items[start:end]
            start, total = end, size
    yield items[start:]


class ProducerMessage(Message, frozen=True):
    """From a producer to a consumer of the channel."""

    channel: str


class ConsumerMessage(Message, frozen=True):
    """From a consumer to a producer of the channel."""

    channel: str


class ChannelAnnounce(ProducerMessage, frozen=True, tag="channel_announce"):
    """Producer: I have no link with you; say hello."""

    epoch: int


class ChannelHello(ConsumerMessage, frozen=True, tag="channel_hello"):
    """Consumer: our link has this number. Sent again it changes nothing."""

    link: int


class ChannelOffer(ProducerMessage, frozen=True, tag="channel_offer"):
    """Producer: `depth` items wait that you may have."""

    epoch: int
    link: int
    depth: int


class ItemHead(NamedTuple):
    """What travels beside an item's payload."""

    sequence: int
    attempt: int  # counted from 1
    priority: int
    key: Key


class ChannelBatch(ProducerMessage, frozen=True, tag="channel_batch"):
    """Producer: items, whose payloads are the list beside the message. Also answers a recall."""

    epoch: int
    link: int
    serial: int  # counts the batches of a link from 1
    items: tuple[ItemHead, ...]
    depth: int
    returned: int | None = None  # unused credit, where this answers a recall


class ChannelCancel(ProducerMessage, frozen=True, tag="channel_cancel"):
    """Producer: nobody waits for these items any more; finish them as you like."""

    link: int
    sequences: tuple[int, ...]


class ChannelProducerLeft(ProducerMessage, frozen=True, tag="channel_producer_left"):
    """Producer: the link is over; what you hold of it is cancelled and need not be acknowledged."""

    link: int


class ChannelSettle(ConsumerMessage, frozen=True, tag="channel_settle"):
    """Consumer: items done, items returned, items that could not be read, and new credit.

    The payload is the list of results, aligned with `acks`; where items are handed back, it is a list
    of that and the list of replacements, aligned with `handed_back`. A replacement is None or a list
    of one payload. A list of nothing but None is None, and so is the payload.
    """

    link: int
    credit: int = 0
    accepting: bool = True  # False: capacity is 0, count on others
    acks: tuple[int, ...] = ()
    handed_back: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()


class ChannelRecall(ConsumerMessage, frozen=True, tag="channel_recall"):
    """Consumer: return the credit you do not use."""

    link: int


class ChannelConsumerLeft(ConsumerMessage, frozen=True, tag="channel_consumer_left"):
    """Consumer: the link is over; take back what is in flight on it."""

    link: int


class Outgoing(NamedTuple):
    """A message to be sent."""

    peer: str
    message: Message
    payload: Any = None
