"""`flowctl resume`: go on with a job that ended early."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "resume"
HELP = "go on with an interrupted, failed or cancelled job from its last commit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--follow", action="store_true", help="show the job until it ends")


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.commands.submit import START_S
    from flowd.console import hint, print_json
    from flowd.follow import follow_job
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        status = client.request(NAME, {"job": args.job}, timeout_s=START_S)
        if args.follow:
            return follow_job(client, args.job, as_json=args.json)
    if args.json:
        print_json(status)
    else:
        reached = status.get("step") or 0
        hint(
            f'resumed job "{args.job}" from its last commit (it had reached step {reached}); '
            f"`flowctl status {args.job} --follow` shows it"
        )
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    return await daemon.resume(arguments["job"])
