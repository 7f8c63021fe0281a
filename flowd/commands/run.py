"""`flowctl run`: run a job without a daemon, in this process."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowd.commands.submit import add_set

if TYPE_CHECKING:
    from actors.job_config import JobConfig
    from flowd.paths import StatePaths

NAME = "run"
HELP = "run a job inline: one process, one event loop, no daemon; breakpoint() works in any stage"

LOG = "inline"  # the one log of all actors, in logs/


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job_file", metavar="JOB.toml")
    parser.add_argument("--inline", action="store_true", help="required; for a daemon: submit")
    add_set(parser)


def run(args: argparse.Namespace) -> int:
    from flowd.errors import RequestError
    from flowd.follow import conclude, make_view
    from flowd.job import load_job
    from flowd.runs import paths_of

    if not args.inline:
        raise RequestError(
            f"`flowctl run {args.job_file}` needs --inline, which runs the job in this process; "
            f"to run it on flowd: `flowctl submit {args.job_file} --follow`"
        )
    config = load_job(args.job_file, args.set)
    # Never live: a debugger's prompt needs the terminal.
    with make_view(config.job.name, as_json=args.json, live=False) as view:
        view.watched.steps = config.job.steps
        run_to_end(config, paths_of(args), view.show)
    return conclude(view.watched)


def run_to_end(
    config: "JobConfig", paths: "StatePaths", show: Callable[[dict[str, Any]], None]
) -> None:
    """Run a job in this process; show(update) is called for all that happens, and with the status that it ends with.

    RequestError, with nothing done, for a job that cannot be run here or whose name is taken.
    """
    import asyncio
    import logging

    from flowd.errors import RequestError
    from flowd.job import dump_job
    from flowd.planner import stage_devices
    from flowd.watched import update_of

    if stage_devices(config).get("trainer", 0) > 1:
        # Ranks wait for each other inside a collective: on one loop the first would wait for ever.
        raise RequestError(
            f"[trainer] devices = {config.trainer.devices}: inline is one process, and one process is one rank; "
            "use --set trainer.devices=1, or `flowctl submit` on a flowd"
        )
    name = config.job.name
    run_paths = paths.run(name)
    try:
        run_paths.root.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        raise RequestError(
            f'job "{name}" exists already in {paths.runs}: choose another name with '
            f"--set job.name={name}-2, or remove {run_paths.root}"
        ) from None
    except OSError as error:
        raise RequestError(
            f"{run_paths.root} cannot be made ({error.strerror}): name a directory of your own with "
            "--state-dir or FLOWD_HOME"
        ) from None
    run_paths.job_toml.write_text(dump_job(config))
    run_paths.logs.mkdir()
    # On the terminal are the job's steps and the debugger; the rest is for `flowctl logs`.
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        handlers=[logging.FileHandler(run_paths.actor_log(LOG))],
    )

    from flowd.inline import run_inline  # after the checks: it loads what actors compute with

    job = asyncio.run(
        run_inline(
            config,
            run_paths.root,
            paths.cache,
            lambda kind, data: show(update_of(kind, data)),
        )
    )
    show({"event": "status", "status": job.status()})
