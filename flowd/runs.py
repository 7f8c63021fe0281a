"""Reads what jobs left in their run directories; needs no running flowd."""

import argparse
import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowd.errors import FlowdError, RequestError, UnknownJob
from flowd.paths import RunPaths, StatePaths, state_directory


def paths_of(args: argparse.Namespace) -> StatePaths:
    """The state directory that a command line means."""
    return StatePaths(state_directory(args.state_dir))


def existing_run(paths: StatePaths, job: str) -> RunPaths:
    """The run directory of a job; UnknownJob when there is none."""
    try:
        known = sorted(entry.name for entry in paths.runs.iterdir()) if paths.runs.is_dir() else []
    except PermissionError as error:
        raise RequestError(
            f"{error.filename} cannot be read ({error.strerror}): name a state directory of your own "
            "with --state-dir or FLOWD_HOME"
        ) from None
    if job not in known:
        raise UnknownJob(unknown_job(job, known, where=f" in {paths.runs}"))
    return paths.run(job)


def run_named(paths: StatePaths, name: str) -> RunPaths:
    """The run of a job, or of a run directory (one with a job.toml; a path, not a bare word)."""
    if os.sep not in name:
        return existing_run(paths, name)
    run = RunPaths(Path(name).expanduser().absolute())
    if not run.job_toml.is_file():
        raise RequestError(
            f"{name} is no run directory: it has no job.toml; name a job, or a directory of {paths.runs}"
        )
    return run


def unknown_job(job: str, known: list[str], where: str = "") -> str:
    """The sentence about a job that does not exist."""
    near = difflib.get_close_matches(job, known, n=1)
    if near:
        way = f'did you mean "{near[0]}"?'
    elif known:
        way = f"there are {', '.join(known[:10])}"
    else:
        way = "there are no jobs; `flowctl submit JOB.toml` starts one"
    return f'no job "{job}"{where}; {way}'


def json_lines(path: Path, missing: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line that is still being written is left out.

    missing: what to say when the file does not exist.
    """
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        raise FlowdError(missing) from None
    with file:
        for line_number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise FlowdError(
                    f"{path}, line {line_number} is not JSON ({error}): the file was damaged; "
                    "remove the line to read the rest"
                ) from None


def last_state(run_paths: RunPaths) -> str:
    """The state that a job's event log ends with; "" when it says none."""
    state = ""
    if run_paths.events.exists():
        for event in json_lines(run_paths.events, ""):
            if event.get("kind") == "job":
                state = str(event.get("state", ""))
    return state
