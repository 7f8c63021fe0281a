"""The edges of a job from the reports of its actors."""

from collections.abc import Sequence
from typing import Any

import pytest

from flowd.edges import edges


def sends(channel: str, consumer: str, **changes: Any) -> dict[str, Any]:
    """What a producer reports of one edge."""
    return {
        "channel": channel,
        "consumer": consumer,
        "transport": "ipc",
        "why": "same node",
        "depth": 0,
        "waiters": 0,
        "size_bytes": 0,
        "in_flight": 0,
        "credit": 2,
        "items_per_s": 1.5,
        "bytes_per_s": 1500.0,
        **changes,
    }


def takes(channel: str, **changes: Any) -> dict[str, Any]:
    """What a consumer reports of one channel."""
    return {"channel": channel, "depth": 0, "in_flight": 0, "waiters": 0, **changes}


def report(*, producing: Sequence[Any] = (), consuming: Sequence[Any] = ()) -> dict[str, Any]:
    return {"channels": {"producing": producing, "consuming": consuming}}


def test_a_row_for_each_channel_and_pair() -> None:
    """In order of names, without the job's; actors that said nothing yet are no end of anything."""
    rows = edges(
        "toy",
        {
            "env-1": report(producing=[sends("requests", "toy/rollout-0", depth=3, in_flight=2)]),
            "env-0": report(
                producing=[sends("requests", "toy/rollout-0"), sends("groups", "toy/trainer-0")]
            ),
            "rollout-0": report(consuming=[takes("requests")]),
            "rollout-1": {},
        },
    )
    assert [(row["channel"], row["producer"], row["consumer"]) for row in rows] == [
        ("groups", "env-0", "trainer-0"),
        ("requests", "env-0", "rollout-0"),
        ("requests", "env-1", "rollout-0"),
    ]
    last = rows[-1]
    assert (last["depth"], last["in_flight"], last["items_per_s"]) == (3, 2, 1.5)
    assert (last["transport"], last["why"]) == ("ipc", "same node")


@pytest.mark.parametrize(
    ("edge", "end", "producer_waits", "consumer_waits"),
    [
        ({}, {}, "", ""),
        ({"depth": 1, "credit": 0}, {}, "credit", ""),
        ({"depth": 1, "credit": 2}, {}, "", ""),
        ({"depth": 0, "credit": 0}, {}, "", ""),
        ({"waiters": 1, "depth": 1, "credit": 0}, {}, "bound", ""),
        ({}, {"waiters": 1}, "", "items"),
        ({}, {"waiters": 1, "depth": 1}, "", ""),
    ],
)
def test_who_waits(
    edge: dict[str, Any], end: dict[str, Any], producer_waits: str, consumer_waits: str
) -> None:
    """A producer for credit, while items wait, or for its bound; a consumer for items, while it has none."""
    (row,) = edges(
        "toy",
        {
            "env-0": report(producing=[sends("requests", "toy/rollout-0", **edge)]),
            "rollout-0": report(consuming=[takes("other", waiters=9), takes("requests", **end)]),
        },
    )
    assert (row["producer_waits"], row["consumer_waits"]) == (producer_waits, consumer_waits)
