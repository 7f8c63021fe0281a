"""`flowctl devices`: what can be leased, and who holds it."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "devices"
HELP = "list the devices and who holds their leases"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import print_json, size, table
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        devices = client.request(NAME, {})["devices"]
    if args.json:
        print_json(devices)
    else:
        rows = [
            {**device, "memory": size(device["memory_bytes"]), "holders": device.get("holders")}
            for device in devices
        ]
        print(table(rows, ("id", "name", "memory", "holders")))
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    return {"devices": daemon.devices()}
