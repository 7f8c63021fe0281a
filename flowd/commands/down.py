"""`flowd down`: stop the daemon with all that it started."""

import argparse
import os
import select
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "down"
HELP = "stop flowd and every actor it runs; jobs are interrupted and can be resumed"
DEADLINE_S = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import hint, print_json
    from flowd.errors import DaemonLost, FlowdError
    from flowd.runs import paths_of

    paths = paths_of(args)
    with ControlClient(paths) as client:
        pid = client.pid
        try:
            process = os.pidfd_open(pid)  # before it is told: a pid that ended may be another's
        except ProcessLookupError:
            process = None
        try:
            client.request(NAME, {})
        except DaemonLost:
            pass  # it was quicker to go than to answer
    if process is not None:
        try:
            gone, _, _ = select.select([process], [], [], DEADLINE_S)
        finally:
            os.close(process)
        if not gone:
            raise FlowdError(
                f"flowd (pid {pid}) is still stopping after {DEADLINE_S:g} s: see {paths.log}; "
                f"`kill -9 {pid}` ends it, and its actors leave within their grace"
            )
    if args.json:
        print_json({"pid": pid})
    else:
        hint(f"flowd (pid {pid}) stopped")
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    daemon.request_shutdown()
    return {"pid": os.getpid()}
