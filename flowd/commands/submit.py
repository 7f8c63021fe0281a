"""`flowctl submit`: start a job."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "submit"
START_S = 300.0  # the first job waits for the fork server, which imports torch from a cold disk
HELP = "start a job from its TOML file; --follow watches it, Ctrl-C then leaves it running"
START_S = 300.0  # flowd may have just begun to import what actors need, from a cold disk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", metavar="JOB.toml")
    add_set(parser)
    parser.add_argument("--follow", action="store_true", help="show the job until it ends")


def add_set(parser: argparse.ArgumentParser) -> None:
    """The option that changes keys of the job file."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a key of the job; the value as in TOML, a bare word is text; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import hint, print_json
    from flowd.follow import follow_job
    from flowd.job import dump_job, load_job
    from flowd.runs import paths_of

    config = load_job(args.job_file, args.set)
    name = config.job.name
    with ControlClient(paths_of(args)) as client:
        arguments = {"toml": dump_job(config), "source": args.job_file}
        status = client.request(NAME, arguments, timeout_s=START_S)
        if args.follow:
            return follow_job(client, name, as_json=args.json)
    if args.json:
        print_json(status)
    else:
        print(name)
        hint(f'submitted job "{name}"; `flowctl status {name} --follow` shows it')
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    from flowd.job import dump_job, parse_job

    config = parse_job(arguments["toml"], arguments["source"])
    return await daemon.submit(config.job.name, config, dump_job(config))
