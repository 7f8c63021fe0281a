"""`flowctl events`: what happened, in order."""

import argparse
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowd.control import Daemon

NAME = "events"
HELP = "show what happened to jobs and actors; --follow goes on with what happens"
PAGE = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="default: all jobs")
    parser.add_argument("--follow", action="store_true", help="go on until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    from flowd.client import ControlClient
    from flowd.console import print_json
    from flowd.runs import paths_of

    def show(event: dict[str, Any]) -> None:
        if args.json:
            print_json(event)
        else:
            print(event_line(event), flush=True)

    with ControlClient(paths_of(args)) as client:
        if not args.follow:
            after = 0
            while page := client.request(NAME, {"job": args.job, "after_id": after})["events"]:
                for event in page:
                    show(event)
                after = page[-1]["id"]
            return 0
        try:
            for update in client.follow(NAME, {"job": args.job}):
                for event in (update or {}).get("events", []):
                    show(event)
        except KeyboardInterrupt:
            pass  # the way to end it
    return 0


def event_line(event: dict[str, Any]) -> str:
    """Local time, kind, and the rest as key=value; tracebacks are left to --json and `status`."""
    from flowd.console import cell

    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.get("time", 0)))
    rest = {key: value for key, value in event.items() if key not in ("id", "time", "kind")}
    pairs = "  ".join(
        f"{key}={cell(value)}"
        for key, value in rest.items()
        if value not in (None, "", []) and "\n" not in str(value)
    )
    return f"{when}  {event.get('kind', '-')}  {pairs}".rstrip()


async def handle(daemon: "Daemon", arguments: dict[str, Any]) -> dict[str, Any]:
    if arguments["job"] is not None:
        daemon.status(arguments["job"])  # UnknownJob rather than an empty list
    return {"events": daemon.events(arguments["job"], arguments["after_id"], PAGE)}


async def stream(daemon: "Daemon", arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """All events so far, then new ones, {"events": […]} at a time.

    Updates only say when to look: the store has the order.
    """
    job = arguments["job"]
    if job is not None:
        daemon.status(job)
    updates = daemon.subscribe(job)
    after = 0
    try:
        while True:
            while page := daemon.events(job, after, PAGE):
                yield {"events": page}
                after = page[-1]["id"]
            if await anext(updates, None) is None:
                return
    finally:
        close = getattr(updates, "aclose", None)
        if close is not None:
            await close()
