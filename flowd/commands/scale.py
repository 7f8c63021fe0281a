"""`flowctl scale`: move devices between stages of a running job."""

import argparse
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "scale"
HELP = "change how many devices (env: actors) a stage of a running job has, while it runs"
DEADLINE_S = 600.0
REFUSAL_S = 1.0  # a request that does not fit is refused well within this


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "change", metavar="STAGE=CHANGE", help="as in rollout=+2, rollout=-2, rollout=3"
    )
    parser.add_argument("--job", metavar="JOB", help="default: the only running one")
    parser.add_argument(
        "--from",
        dest="from_stage",
        metavar="STAGE",
        help="take devices of this stage once none is idle",
    )
    parser.add_argument(
        "--wait", action="store_true", help="return when the change is done, with its seconds"
    )


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import hint, print_json
    from flowd.errors import DaemonLost
    from flowd.runs import paths_of

    stage, change = parse_change(args.change)
    arguments = {
        "job": args.job,
        "stage": stage,
        "change": change,
        "from_stage": args.from_stage,
    }
    with ControlClient(paths_of(args)) as client:
        if args.wait:
            done = client.request(NAME, arguments, timeout_s=DEADLINE_S)
        else:
            # flowd carries on when we leave; the short wait is for a refusal.
            try:
                done = client.request(NAME, arguments, timeout_s=REFUSAL_S)
            except DaemonLost:
                client.request("jobs", {})  # it lives, so it is at work on the change
                done = None
    if args.json:
        print_json({"done": done is not None, **(done or {})})
    elif done is None:
        hint(f"{args.change} is under way; `flowctl status` shows it, --wait waits for it")
    else:
        print(scale_text(args.change, done))
    return 0


def parse_change(text: str) -> tuple[str, str]:
    """The stage, and the change: "+N", "-N" or "N"."""
    from flowd.errors import RequestError

    match = re.fullmatch(r"([a-z_]+)=([+-]?\d+)", text)
    if not match:
        raise RequestError(
            f"{text!r} is not a change of a stage: write STAGE=+N, STAGE=-N or STAGE=N, "
            "as in rollout=+2"
        )
    return match[1], match[2]


def scale_text(change: str, done: dict[str, Any]) -> str:
    """What happened, for reading."""
    from flowd.console import number

    started, stopped = done.get("started") or [], done.get("stopped") or []
    parts = [
        f"{name} {number(done[key], 2)} s"
        for name, key in (
            ("drain", "seconds_drain"),
            ("ready", "seconds_ready"),
            ("first output", "seconds_first_output"),
        )
        if done.get(key) is not None
    ]
    text = f"{change} in {number(done.get('seconds_total'), 2)} s"
    if parts:
        text += f" ({', '.join(parts)})"
    for verb, names in (("started", started), ("stopped", stopped)):
        if names:
            text += f"; {verb} {', '.join(map(str, names))}"
    return text


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    from flowd.commands.status import newest_job

    job = arguments["job"] or newest_job(daemon, running_only=True)
    return await daemon.scale(job, arguments["stage"], arguments["change"], arguments["from_stage"])
