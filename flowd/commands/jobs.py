"""`flowctl jobs`: every job, in a line each."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "jobs"
HELP = "list the jobs, running and ended"
COLUMNS = ("name", "state", "step", "steps", "reward_mean", "staleness_max", "tokens_per_s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import hint, number, print_json, table
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        jobs = client.request(NAME, {})["jobs"]
    if args.json:
        print_json(jobs)
    elif jobs:
        rows = [{**job, "tokens_per_s": number(job.get("tokens_per_s"), 0)} for job in jobs]
        print(table(rows, COLUMNS))
    else:
        hint("no jobs; `flowctl submit JOB.toml` starts one")
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": daemon.jobs()}
