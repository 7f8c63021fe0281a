"""`flowctl plan`: what a job would run where, without running it."""

import argparse
from typing import TYPE_CHECKING, Any

from flowd.commands.submit import add_set

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from actors.job_config import JobConfig
    from flowd.control import Daemon
    from flowd.devices import Device

NAME = "plan"
HELP = "check a job file and show which replica would get which devices"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", metavar="JOB.toml")
    add_set(parser)
    parser.add_argument(
        "--devices",
        metavar="SPEC",
        help="plan on these instead of the running flowd's: auto, cpu:N or 0,1,…",
    )


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import hint, print_json, table
    from flowd.errors import NoDaemon
    from flowd.job import dump_job, load_job
    from flowd.runs import paths_of

    config = load_job(args.job_file, args.set)
    if args.devices is not None:
        planned = _plan_here(config, args.devices)
    else:
        try:
            with ControlClient(paths_of(args)) as client:
                arguments = {"toml": dump_job(config), "source": args.job_file}
                planned = client.request(NAME, arguments)
        except NoDaemon:
            hint("no flowd is running: planning on this machine's devices, all idle")
            planned = _plan_here(config, "auto")
    if args.json:
        print_json(planned)
    else:
        print(f"{planned['job']}: {planned['mode']}, {len(planned['replicas'])} replicas")
        print(table(planned["replicas"], ("replica", "stage", "devices")))
    return 0


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    from flowd.devices import Device
    from flowd.job import parse_job

    config = parse_job(arguments["toml"], arguments["source"])
    rows = daemon.devices()
    fields = Device.__dataclass_fields__
    devices = [Device(**{key: row[key] for key in fields if key in row}) for row in rows]
    occupied = {row["id"]: ", ".join(row["holders"]) for row in rows if row.get("holders")}
    return _planned(config, devices, occupied)


def _plan_here(config: "JobConfig", spec: str) -> dict[str, Any]:
    from flowd.devices import inventory
    from flowd.errors import RequestError

    try:
        devices = inventory(spec)
    except ValueError as error:
        raise RequestError(str(error)) from error
    return _planned(config, devices, {})


def _planned(
    config: "JobConfig", devices: "Sequence[Device]", occupied: "Mapping[str, str]"
) -> dict[str, Any]:
    from flowd.planner import plan

    made = plan(config, devices, occupied)
    return {
        "job": config.job.name,
        "mode": made.mode,
        "replicas": [
            {"replica": replica.id, "stage": replica.stage, "devices": list(replica.devices)}
            for replica in made.replicas
        ],
    }
