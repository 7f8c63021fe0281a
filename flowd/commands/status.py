"""`flowctl status`: one job and its actors."""

import argparse
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "status"
HELP = "show a job and its actors; without JOB the newest one that runs; --follow until it ends"
ACTOR_COLUMNS = ("name", "kind", "state", "pid", "node", "devices", "restarts", "waits_for")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB")
    parser.add_argument("--follow", action="store_true", help="show the job until it ends")


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import print_json
    from flowd.follow import follow_job
    from flowd.runs import paths_of

    with ControlClient(paths_of(args)) as client:
        status = client.request(NAME, {"job": args.job})
        if args.follow:
            return follow_job(client, status["name"], as_json=args.json)
    if args.json:
        print_json(status)
    else:
        print(status_text(status))
    return 0


def status_text(status: dict[str, Any]) -> str:
    """A job for reading. What ended a failed one comes first, its traceback before the sentence."""
    from flowd.console import failure, number, stage_times, table, traceback_of

    lines: list[str] = []
    if status["state"] in ("failed", "interrupted"):
        if text := traceback_of(status):
            lines.append(text)
        lines += [failure(status), ""]
    lines.append(f"{status['name']}  {status['state']}  step {status['step']}/{status['steps']}")
    lines.append(
        f"policy version {number(status.get('policy_version'))}, "
        f"reward {number(status.get('reward_mean'))}, "
        f"staleness at most {number(status.get('staleness_max'))}, "
        f"{number(status.get('tokens_per_s'), 0)} tokens/s, "
        f"attempt {number(status.get('attempt'))}"
    )
    actors = status.get("actors") or []
    if actors:
        lines += ["", table(actors, ACTOR_COLUMNS)]
        lines += [f"{kind}: {text}" for kind, text in stage_times(actors).items()]
    return "\n".join(lines)


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    return daemon.status(arguments.get("job") or newest_job(daemon))


async def stream(daemon: "Daemon", arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The job's status, its updates until it ends, and its status then."""
    from flowd.control import ENDED

    job = arguments["job"]
    updates = daemon.subscribe(job)  # before the status is read, so that nothing falls between
    try:
        status = daemon.status(job)
        yield {"event": "status", "status": status}
        if status["state"] in ENDED:
            return
        async for update in updates:
            yield update
            if update["event"] == "job" and update["state"] in ENDED:
                break
        yield {"event": "status", "status": daemon.status(job)}
    finally:
        close = getattr(updates, "aclose", None)
        if close is not None:
            await close()


def newest_job(daemon: "Daemon", *, running_only: bool = False) -> str:
    """The job that is meant when none is named: the newest running one, else the newest."""
    from flowd.control import ENDED
    from flowd.errors import RequestError

    jobs = daemon.jobs()
    running = [job["name"] for job in jobs if job["state"] not in ENDED]
    if running_only and len(running) != 1:
        listed = (
            f"{len(running)} jobs are running ({', '.join(running)})" if running else "none runs"
        )
        raise RequestError(f"no job was named and {listed}: name one with --job")
    if not jobs:
        raise RequestError("there are no jobs: `flowctl submit JOB.toml` starts one")
    return str(running[-1] if running else jobs[-1]["name"])
