"""What an actor's heartbeats tell of its channels: each edge to a consumer, and each channel it takes from.

Rates are over the time since the heartbeat before. Nothing here runs per item: the counts are the channels' own.
"""

import time
from collections.abc import Callable
from typing import Any

from channels.channel import ChannelRouter
from channels.errors import PeerLost


class ChannelReports:
    """One per actor; flowd puts those of two actors together, see `flowd.edges`."""

    def __init__(self, router: ChannelRouter, clock: Callable[[], float] = time.monotonic) -> None:
        self._router = router
        self._clock = clock
        self._since = clock()
        self._before: dict[tuple[str, str], tuple[int, int]] = {}  # items and bytes by edge

    def report(self) -> dict[str, list[dict[str, Any]]]:
        """Both ends' channels of this actor, now."""
        now = self._clock()
        seconds, self._since = now - self._since, now
        before, self._before = self._before, {}
        producing = []
        for producer in self._router.producers.values():
            whole = producer.statistics()
            for edge in producer.edges():
                try:
                    transport, why = self._router.endpoint.transport(edge.consumer)
                except PeerLost:
                    continue  # it died, and is about to be forgotten
                key = (whole.channel, edge.consumer)
                self._before[key] = (edge.items, edge.size_bytes)
                items, size = before.get(key, (0, 0))
                if edge.items < items:
                    items, size = 0, 0  # the two met anew, and counted from there
                producing.append(
                    {
                        "channel": whole.channel,
                        "consumer": edge.consumer,
                        "transport": transport,
                        "why": why,
                        "depth": whole.depth,
                        "waiters": whole.waiters,
                        "size_bytes": whole.size_bytes,
                        "in_flight": edge.in_flight,
                        "credit": edge.credit,
                        "items_per_s": _rate(edge.items - items, seconds),
                        "bytes_per_s": _rate(edge.size_bytes - size, seconds),
                    }
                )
        consuming = []
        for consumer in self._router.consumers.values():
            here = consumer.statistics()
            consuming.append(
                {
                    "channel": here.channel,
                    "depth": here.depth,
                    "in_flight": here.in_flight,
                    "waiters": here.waiters,
                }
            )
        return {"producing": producing, "consuming": consuming}


def _rate(amount: int, seconds: float) -> float:
    return round(amount / seconds, 1) if seconds > 0 else 0.0
