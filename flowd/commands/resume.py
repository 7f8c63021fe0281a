"""`flowctl resume`: go on with a job that ended early."""

import argparse
from typing import TYPE_CHECKING, Any

from flowd.commands.submit import add_set

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "resume"
HELP = "go on with a job that ended early, from its last commit; --set changes keys of the job"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    add_set(parser)
    parser.add_argument("--follow", action="store_true", help="show the job until it ends")


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.commands.submit import START_S
    from flowd.console import hint, print_json
    from flowd.follow import follow_job
    from flowd.job import dump_job, parse_job
    from flowd.runs import existing_run, paths_of

    arguments = {"job": args.job}
    if args.set:
        job_toml = existing_run(paths_of(args), args.job).job_toml
        config = parse_job(job_toml.read_text(), f'job "{args.job}"', args.set)
        arguments["toml"] = dump_job(config)
    with ControlClient(paths_of(args)) as client:
        status = client.request(NAME, arguments, timeout_s=START_S)
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
    return await daemon.resume(arguments["job"], arguments.get("toml"))
