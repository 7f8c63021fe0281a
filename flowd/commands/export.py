"""`flowctl export`: a commit's policy as a Hugging Face folder."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowd.paths import RunPaths

NAME = "export"
HELP = "write the policy of a commit as a Hugging Face folder (config, tokenizer, safetensors)"
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help="a job, or the path of a run directory")
    parser.add_argument("folder", metavar="DIR", help="the folder to write: new, or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="the commit; default: the newest")
    which.add_argument("--best", action="store_true", help="the commit that scored best")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: as they are trained"
    )


def run(args: argparse.Namespace) -> int:
    import json
    import subprocess
    import sys

    import msgspec

    from flowd.console import hint, print_json
    from flowd.errors import FlowdError, RequestError
    from flowd.job import parse_resolved
    from flowd.runs import paths_of, run_named

    run_paths = run_named(paths_of(args), args.job)
    name = run_paths.root.name
    step = _step(run_paths, args)
    folder = Path(args.folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"{folder} is there and not empty: name a folder that is new or empty")
    above = next(parent for parent in folder.parents if parent.exists())
    if not above.is_dir():
        raise RequestError(f"{above} is a file: a folder cannot be made in it; name another one")
    config = parse_resolved(run_paths.job_toml.read_text(), str(run_paths.job_toml))
    if config.policy is not None:
        raise RequestError(
            f'job "{name}" trains a policy that acts on arrays ([policy]): Hugging Face folders are '
            f"for language models; its weights are in {run_paths.checkpoints}, as safetensors"
        )
    request = {
        "config": config,
        "run_dir": str(run_paths.root),
        "step": step,
        "folder": str(folder),
        "dtype": args.dtype,
    }
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
        raise FlowdError(f'step {step} of job "{name}" cannot be exported: {said}')
    exported = json.loads(done.stdout)
    if args.json:
        print_json({"job": name, **exported})
    else:
        print(exported["folder"])
        hint(
            f'policy of step {step} of job "{name}", {exported["parameters"]} parameters in '
            f"{exported['dtype']}; `--set model.path={exported['folder']}` starts a job from it"
        )
    return 0


def _step(run_paths: "RunPaths", args: argparse.Namespace) -> int:
    """The commit that the user means; RequestError when there is none."""
    from actors.conductor.manifest import committed_steps
    from actors.retention import best_commit
    from flowd.errors import FlowdError, RequestError

    name = run_paths.root.name
    steps = committed_steps(run_paths.root)
    if not steps:
        raise FlowdError(f'job "{name}" has no commit yet: it comes with the first step')
    if args.best:
        best = best_commit(run_paths.root)
        if best is None:
            raise RequestError(
                f'job "{name}" has no commit with a score: they come from evaluations, with '
                "[eval] every_steps and [checkpoint] keep_best; name one with --step"
            )
        return best
    if args.step is None:
        return steps[-1]
    if args.step not in steps:
        raise RequestError(
            f'job "{name}" has no commit of step {args.step}: there are {", ".join(map(str, steps))}; '
            "[checkpoint] says which stay"
        )
    return int(args.step)
