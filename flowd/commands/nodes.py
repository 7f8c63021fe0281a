"""`flowctl nodes`: the machines."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "nodes"
HELP = "list the nodes, in a line each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import print_json, table
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        nodes = client.request(NAME, {})["nodes"]
    if args.json:
        print_json(nodes)
    else:
        print(table(nodes, list(dict.fromkeys(key for node in nodes for key in node))))
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    return {"nodes": daemon.nodes()}
