"""`flowctl channels`: the edges between a job's actors, and who waits for whom on them."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "channels"
HELP = "show per channel and pair of actors: transport, what waits, rates, who waits; without JOB the newest one"
COLUMNS = (
    *("channel", "producer", "consumer", "transport"),
    *("depth", "in_flight", "items/s", "bytes/s", "waiting"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB")


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import print_json
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        edges = client.request(NAME, {"job": args.job})["edges"]
    if args.json:
        print_json(edges)
    else:
        print(edges_text(edges))
    return 0


def edges_text(edges: list[dict[str, Any]]) -> str:
    """A table, and below it why each transport was chosen."""
    from flowd.console import number, size, table

    rows = [
        {
            **edge,
            "items/s": number(edge["items_per_s"], 1),
            "bytes/s": size(edge["bytes_per_s"]),
            "waiting": waiting(edge),
        }
        for edge in edges
    ]
    lines = [table(rows, COLUMNS)]
    reasons = dict.fromkeys((edge["transport"], edge["why"]) for edge in edges)
    if reasons:
        lines += ["", *(f"{transport}: {why}" for transport, why in reasons)]
    return "\n".join(lines)


def waiting(edge: dict[str, Any]) -> str:
    """Who waits, in words."""
    parts = []
    if edge["producer_waits"] == "bound":
        parts.append(f"{edge['producer']} may put no more")
    elif edge["producer_waits"]:
        parts.append(f"{edge['producer']} waits for credit")
    if edge["consumer_waits"]:
        parts.append(f"{edge['consumer']} waits for items")
    return ", ".join(parts)


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    from flowd.commands.status import newest_job

    return {"edges": daemon.channels(arguments.get("job") or newest_job(daemon))}
