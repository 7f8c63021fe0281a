"""The edges of a job: who sends to whom, how, how much, and who waits. Put together from what both ends reported."""

from collections.abc import Mapping
from typing import Any

NOTHING: Mapping[str, Any] = {"depth": 0, "waiters": 0}


def edges(job: str, reports: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each channel and pair of actors that were introduced, in order of their names.

    reports: the last heartbeat's report by actor    Rows have
    channel, producer, consumer, transport, why,
    depth: items that wait at the producer, for any of its consumers, and size_bytes of all it holds
    in_flight: items sent to this consumer and not finished
    items_per_s, bytes_per_s: between the producer's last two heartbeats
    producer_waits: for what the producer waits: "" for nothing, "credit" where this consumer has no room for
    items that are there, "bound" where it may put no more
    consumer_waits: "items" where the consumer has none to work on, else ""
    """
    rows = []
    for producer, report in reports.items():
        for edge in report.get("channels", {}).get("producing", []):
            consumer = edge["consumer"].removeprefix(f"{job}/")
            there = _consuming(reports.get(consumer, {}), edge["channel"])
            rows.append(
                {
                    "channel": edge["channel"],
                    "producer": producer,
                    "consumer": consumer,
                    "transport": edge["transport"],
                    "why": edge["why"],
                    "depth": edge["depth"],
                    "size_bytes": edge["size_bytes"],
                    "in_flight": edge["in_flight"],
                    "items_per_s": edge["items_per_s"],
                    "bytes_per_s": edge["bytes_per_s"],
                    "producer_waits": _producer_waits(edge),
                    "consumer_waits": "items" if there["waiters"] and not there["depth"] else "",
                }
            )
    rows.sort(key=lambda row: (row["channel"], row["producer"], row["consumer"]))
    return rows


def _producer_waits(edge: Mapping[str, Any]) -> str:
    if edge["waiters"]:
        return "bound"
    return "credit" if edge["depth"] and not edge["credit"] else ""


def _consuming(report: Mapping[str, Any], channel: str) -> Mapping[str, Any]:
    for end in report.get("channels", {}).get("consuming", []):
        if end["channel"] == channel:
            found: Mapping[str, Any] = end
            return found
    return NOTHING
