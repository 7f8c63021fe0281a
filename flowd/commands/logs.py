"""`flowctl logs`: what actors printed."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from flowd.paths import RunPaths, StatePaths

NAME = "logs"
HELP = "show what a job's actors wrote; what made a job fail comes first"
LOOK_INTERVAL_S = 0.2  # files have no event to wait for that works everywhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("--actor", metavar="ACTOR", help="as in rollout-0; default: all")
    parser.add_argument("--follow", action="store_true", help="go on until the job ends")


def run(args: argparse.Namespace) -> int:
    from flowd.console import hint, print_json
    from flowd.errors import FlowdError
    from flowd.runs import existing_run, paths_of

    paths = paths_of(args)
    run_paths = existing_run(paths, args.job)
    _check_actor(run_paths, args.actor)
    reader = LogReader(run_paths.logs, args.actor)

    def show() -> None:
        for actor, line in reader.new_lines():
            if args.json:
                print_json({"actor": actor, "line": line})
            else:
                print(line if args.actor else f"{actor} | {line}", flush=True)

    try:
        _print_failure(paths, args.job)
        show()
        if args.follow:
            for _ in _ticks_until_end(paths, args.job):
                show()
            show()
    except KeyboardInterrupt:
        pass  # the way to end it
    except FlowdError as error:
        # What is on disk was shown; only the watching ended early.
        hint(f"no longer following: {error}")
        return error.exit_code
    finally:
        reader.close()
    return 0


class LogReader:
    """Yields the lines that log files got since it was last asked; later files count too."""

    def __init__(self, folder: Path, actor: str | None) -> None:
        self._folder = folder
        self._pattern = f"{actor}.log" if actor else "*.log"
        self._files: dict[Path, BinaryIO] = {}
        self._partial: dict[Path, bytes] = {}

    def new_lines(self) -> Iterator[tuple[str, str]]:
        """(actor, line) of every finished line, file by file."""
        for path in sorted(self._folder.glob(self._pattern)):
            if path not in self._files:
                self._files[path] = path.open("rb")
            content = self._partial.pop(path, b"") + self._files[path].read()
            *lines, rest = content.split(b"\n")
            self._partial[path] = rest
            for line in lines:
                yield path.stem, line.decode(errors="replace")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _check_actor(run_paths: "RunPaths", actor: str | None) -> None:
    import difflib

    from flowd.errors import RequestError

    known = sorted(path.stem for path in run_paths.logs.glob("*.log"))
    if actor is None or actor in known:
        return
    near = difflib.get_close_matches(actor, known, n=1)
    way = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'no logs yet'}"
    raise RequestError(f'no log of actor "{actor}" in {run_paths.logs}; {way}')


def _print_failure(paths: "StatePaths", job: str) -> None:
    """The traceback that ended the job, on stderr. Without flowd the actor's log still has it."""
    from flowd.client import ControlClient
    from flowd.console import failure, hint, traceback_of
    from flowd.errors import NoDaemon, UnknownJob

    try:
        with ControlClient(paths) as client:
            status: dict[str, Any] = client.request("status", {"job": job})
    except (NoDaemon, UnknownJob):
        return
    if status["state"] == "failed":
        if text := traceback_of(status):
            hint(text)
        hint(failure(status, way_out=False) + "\n")


def _ticks_until_end(paths: "StatePaths", job: str) -> Iterator[None]:
    from flowd.client import ControlClient

    with ControlClient(paths) as client:
        yield from (
            None
            for _ in client.follow("status", {"job": job, "follow": True}, idle_s=LOOK_INTERVAL_S)
        )
