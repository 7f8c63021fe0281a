"""The commits of a run, for commands that want its policy."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from actors.conductor.manifest import ManifestError, committed_steps
from actors.errors import ActorError
from actors.job_config import JobConfig
from actors.retention import best_commit
from flowd.errors import FlowdError, RequestError
from flowd.paths import RunPaths


def chosen_commit(run_paths: RunPaths, step: int | None, *, best: bool) -> int:
    """The commit that the user means, without either the newest; RequestError when there is none."""
    name = run_paths.root.name
    steps = committed_steps(run_paths.root)
    if not steps:
        raise FlowdError(f'job "{name}" has no commit yet: it comes with the first step')
    if best:
        found = best_commit(run_paths.root)
        if found is None:
            raise RequestError(
                f'job "{name}" has no commit with a score: they come from evaluations, with '
                "[eval] every_steps and [checkpoint] keep_best; name one with --step"
            )
        return found
    if step is None:
        return steps[-1]
    if step not in steps:
        raise RequestError(
            f'job "{name}" has no commit of step {step}: there are {", ".join(map(str, steps))}; '
            "[checkpoint] says which stay"
        )
    return step


def write_policy(
    run_paths: RunPaths,
    config: JobConfig,
    step: int,
    folder: Path,
    dtype: str | None = None,
    *,
    part: str = "policy",
    load_torch: bool,
) -> dict[str, Any]:
    """Write the policy of a commit as a folder for [model] or [policy] path, or the part of it that an `ExportRequest`
    names; what was written, as `actors.trainer.export` says it.

    load_torch: in this process, unless the trainer has another interpreter; else in one that ends with it
    """
    request = {
        "config": config,
        "run_dir": str(run_paths.root),
        "step": step,
        "folder": str(folder),
        "dtype": dtype,
        "part": part,
    }
    if load_torch and config.trainer.python is None:
        return _write_here(request, f'step {step} of job "{run_paths.root.name}"')
    # The trainer's interpreter has what its model needs.
    command = [config.trainer.python or sys.executable, "-m", "actors.trainer.export"]
    try:
        done = subprocess.run(
            command, input=msgspec.json.encode(request), capture_output=True, check=False
        )
    except OSError as error:
        raise FlowdError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        said = said or f"{command[0]} ended with {done.returncode} and said nothing"
        raise FlowdError(f'step {step} of job "{run_paths.root.name}" cannot be exported: {said}')
    exported: dict[str, Any] = json.loads(done.stdout)
    return exported


def _write_here(request: dict[str, Any], of: str) -> dict[str, Any]:
    # By name: flowd itself stays free of torch.
    module = import_module("actors.trainer.export")
    try:
        exported = module.export(module.ExportRequest(**request))
    except (ActorError, ManifestError, ValueError, OSError) as error:
        raise FlowdError(f"{of} cannot be exported: {type(error).__name__}: {error}") from error
    told: dict[str, Any] = msgspec.to_builtins(exported)
    return told
