"""`flowctl eval`: how good a run's policy, or any model, is on a task."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.job_config import JobConfig
    from flowd.paths import RunPaths, StatePaths

NAME = "eval"
FILMED = 2  # problems, unless eval.videos says otherwise
HELP = "evaluate a run's policy or a Hugging Face model folder on a task, with fixed problems"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from flowd.commands.submit import add_set

    parser.add_argument("target", metavar="RUN_OR_MODEL", help="a run's name, or a model folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of a run: this commit (the newest)")
    which.add_argument("--best", action="store_true", help="of a run: the commit that scored best")
    parser.add_argument("--task", help="a task; of a run the one that it evaluates or trains on")
    parser.add_argument(
        "--args",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="the task's arguments; values as in TOML, a bare word is text",
    )
    parser.add_argument("--split", help="the task's argument split, where it has one (eval)")
    parser.add_argument("--k", type=int, metavar="K", help="samples of each problem")
    parser.add_argument(
        "--problems", "--episodes", "--samples", type=int, metavar="N", help="number of problems"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="chooses problems and draws")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--greedy", action="store_true", help="likeliest tokens alone")
    how.add_argument("--temperature", type=float, metavar="T", help="samples at T alone")
    parser.add_argument(
        "--video", metavar="DIR", help="film the first problems of a simulator, as mp4 files in DIR"
    )
    parser.add_argument("--inline", action="store_true", help="in this process, also beside flowd")
    add_set(parser)


def run(args: argparse.Namespace) -> int:
    from flowd.commits import chosen_commit
    from flowd.console import hint, print_json, table
    from flowd.errors import RequestError
    from flowd.evaluation import columns, free_name, rows
    from flowd.runs import paths_of, run_named

    paths = paths_of(args)
    name = free_name(paths.runs, Path(args.target).name or "model")
    folder = Path(args.target).expanduser()
    run_paths = None
    if not (folder / "config.json").exists() or paths.run(args.target).job_toml.exists():
        if os.sep in args.target and not (folder / "job.toml").exists():
            raise RequestError(
                f"{args.target} has neither config.json, as a Hugging Face model folder, nor job.toml, as a run "
                "directory: name one of these, or a run"
            )
        run_paths = run_named(paths, args.target)
    about: dict[str, Any] = {}
    if run_paths is None:
        run_dir = _carry_out(_of_model(args, folder, name), paths, inline=args.inline)
    else:
        about["of_step"] = step = chosen_commit(run_paths, args.step, best=args.best)
        with _of_run(args, run_paths, step, paths.cache, name) as config:
            run_dir = _carry_out(config, paths, inline=args.inline)
    result = {"target": args.target, **about, "job": name, **_result(run_dir)}
    file = _keep(result, (run_paths or paths).root, name)
    videos = [] if args.video is None else _copy_videos(run_dir, Path(args.video).expanduser())
    if args.json:
        print_json(result)
        return 0
    made = rows(result)
    print(table(made, columns(made)))
    settings = "  ".join(f"{key}={value}" for key, value in result["settings"].items())
    hint(f"{settings}  seconds={result['seconds']:g}")
    for video in videos:
        hint(str(video))
    hint(f"{file} has all of it; `flowctl samples {name} --eval` shows what was generated")
    return 0


def _of_model(args: argparse.Namespace, folder: Path, name: str) -> "JobConfig":
    """The job that evaluates a model folder."""
    from flowd.errors import RequestError
    from flowd.evaluation import evaluation_of_model

    if args.step is not None or args.best:
        raise RequestError(
            f"{folder} is a model folder, which has no commits: leave --step and --best out"
        )
    if args.task is None:
        raise RequestError(f"{folder} is a model folder: say on what to evaluate it, with --task")
    return _checked(evaluation_of_model(args.task, name, folder.resolve()), args)


@contextmanager
def _of_run(
    args: argparse.Namespace, run_paths: "RunPaths", step: int, cache: Path, name: str
) -> Iterator["JobConfig"]:
    """The job that evaluates a commit of a run; its policy is written to a folder for as long as that takes."""
    import shutil
    import tempfile

    from flowd.commits import write_policy
    from flowd.evaluation import evaluation_of_run, with_weights
    from flowd.job import parse_resolved

    trained = parse_resolved(run_paths.job_toml.read_text(), str(run_paths.job_toml))
    config = _checked(evaluation_of_run(trained, name), args)
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cache))
    try:
        # Where the evaluation loads torch here anyway, once is enough; beside a flowd nothing of it stays.
        write_policy(run_paths, trained, step, written, load_torch=args.inline)
        yield with_weights(config, written)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _checked(config: "JobConfig", args: argparse.Namespace) -> "JobConfig":
    """The job with what the command line says. It is written and read again: all rules of a job file hold."""
    from flowd.evaluation import decoding, replace, with_task
    from flowd.job import dump_job, parse_job

    if args.task is not None:
        config = with_task(config, args.task)
    given = {"problems": args.problems, "k": args.k, "seed": args.seed}
    if args.video is not None:
        given["videos"] = config.eval.videos or FILMED
    evaluation = replace(config.eval, **{k: v for k, v in given.items() if v is not None})
    evaluation = decoding(evaluation, greedy=args.greedy, temperature=args.temperature)
    config = replace(config, eval=replace(evaluation, record=evaluation.problems))
    split = [] if args.split is None else [f"eval.args.split={args.split}"]
    overrides = [*(f"eval.args.{argument}" for argument in args.args), *split, *args.set]
    return parse_job(dump_job(config), "flowctl eval", overrides)


def _carry_out(config: "JobConfig", paths: "StatePaths", *, inline: bool) -> Path:
    """Run the job to its end, on flowd if one is up; returns its run directory. JobFailed, with the reason."""
    from flowd.client import ControlClient
    from flowd.commands.run import run_to_end
    from flowd.commands.submit import START_S
    from flowd.console import hint
    from flowd.control import ENDED
    from flowd.errors import NoDaemon, RequestError
    from flowd.follow import check_done
    from flowd.job import dump_job
    from flowd.watched import Watched

    name, watched = config.job.name, Watched(config.job.name)
    try:
        client = None if inline else ControlClient(paths)
    except NoDaemon:
        client = None
    if client is None and not inline and config.env.python is not None:
        raise RequestError(
            f"[env] python = {config.env.python} is another interpreter than this one, and without a flowd all runs in "
            "this one: start one (flowd up --detach), or say --inline if the task is installed here too"
        )
    where = "in this process" if client is None else f"on flowd, as job {name}"
    hint(f"evaluating {config.eval.problems} problems {where}")
    if client is None:
        run_to_end(config, paths, watched.apply)
    else:
        with client:
            arguments = {"toml": dump_job(config), "source": "flowctl eval"}
            client.request("submit", arguments, timeout_s=START_S)
            try:
                for update in client.follow("status", {"job": name, "follow": True}):
                    if update is not None:
                        watched.apply(update)
            except KeyboardInterrupt:
                if watched.state not in ENDED:
                    client.request("cancel", {"job": name})
                raise
    check_done(watched)
    return paths.run(name).root


def _result(run_dir: Path) -> dict[str, Any]:
    import json

    (file,) = (run_dir / "evals").glob("step-*.json")
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _copy_videos(run_dir: Path, folder: Path) -> list[Path]:
    """The videos of the evaluation, in a folder that is made; those of before are written over."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    made = sorted((run_dir / "videos").glob("step-*/*.mp4"))
    return [Path(shutil.copy(video, folder)) for video in made]


def _keep(result: dict[str, Any], root: Path, name: str) -> Path:
    """Write the result beside the run that it is about, or beside the runs."""
    import json

    file = root / "evals" / f"{name}.json"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(json.dumps(result) + "\n")
    return file
