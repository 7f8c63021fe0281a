"""`flowctl cancel`: end a job before its time."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "cancel"
HELP = "end a running job and stop its actors; `resume` goes on from its last commit"
DEADLINE_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import hint, print_json
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        status = client.request(NAME, {"job": args.job}, timeout_s=DEADLINE_S)
    if args.json:
        print_json(status)
    else:
        hint(f'cancelled job "{args.job}" at step {status.get("step") or 0}')
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    return await daemon.cancel(arguments["job"])
