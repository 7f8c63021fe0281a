"""What a freshly forked child of the zygote does to become an actor. It never returns.

Works on plain facts about the parent; knows nothing of the zygote's loop, tables or sockets.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from flowd import actor_exec, linux
from flowd.zygote_messages import TORCH_THREADS_VARIABLE, Spawn

OUR_PACKAGES = ("flowd", "channels", "actors", "sim")
INHERITED_HANDLERS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)
EXEC_FAILED = 127  # as a shell says it


def become_actor(
    spawn: Spawn,
    log_fd: int,
    parent_pid: int,
    packages: Path | None,
    close_inherited: Callable[[], None],
) -> NoReturn:
    """Cut every tie to the zygote but death, then run the entry (or the other interpreter).

    Called right after fork with all signals blocked; `packages` is a folder for the other
    interpreter's path that holds our packages alone.
    """
    try:
        # First, so that there is no moment in which the zygote can die unnoticed.
        linux.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(1)
        close_inherited()
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        os.setsid()
        # Orphans of this actor's own children stay with it; they come to the zygote when it dies.
        linux.set_child_subreaper()
        _reset_signals()
        _set_surroundings(spawn)
        if spawn.python is not None:
            _execute(spawn, spawn.python, packages)
        _forget_the_parent(spawn)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    actor_exec.run_entry(spawn.entry, spawn.argument, spawn.argument_is_json)


def _reset_signals() -> None:
    """Give signals their usual meaning, then let those that came since the fork in."""
    signal.set_wakeup_fd(-1)
    for signum in INHERITED_HANDLERS:
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _set_surroundings(spawn: Spawn) -> None:
    for name, value in spawn.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if spawn.cwd is not None:
        os.chdir(spawn.cwd)
    if spawn.nice:
        os.nice(spawn.nice)
    threads = os.environ.get(TORCH_THREADS_VARIABLE)
    if threads is not None:  # for an OpenMP that is loaded from here on; a loaded one is told below
        os.environ.setdefault("OMP_NUM_THREADS", threads)
    linux.set_process_name(spawn.name)


def _forget_the_parent(spawn: Spawn) -> None:
    """Replace state that the fork copied and that must differ from process to process."""
    actor_exec.forget_exit_handlers()
    gc.enable()
    if "numpy" in sys.modules:  # the standard library reseeds its own generator after a fork
        importlib.import_module("numpy.random").seed()
    threads = os.environ.get(TORCH_THREADS_VARIABLE)
    if threads is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    if "setproctitle" in sys.modules:
        sys.modules["setproctitle"].setproctitle(f"flowd: {spawn.name}")


def _execute(spawn: Spawn, python: str, packages: Path | None) -> NoReturn:
    """Replace this process by another interpreter that runs the same entry."""
    # An anonymous file rather than a pipe: a pipe holds 64 KiB, and nobody would empty it.
    argument_fd = os.memfd_create("argument", 0)  # 0: inherited over exec
    with open(argument_fd, "wb", closefd=False) as file:
        file.write(spawn.argument)
    os.lseek(argument_fd, 0, os.SEEK_SET)
    if "PYTHONHOME" not in spawn.environment:
        os.environ.pop("PYTHONHOME", None)  # belongs to the zygote's interpreter
    path = [str(packages), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    command = [python, "-m", "flowd.actor_exec", "--entry", spawn.entry]
    command += ["--argument-fd", str(argument_fd)]
    command += ["--argument-is-json"] if spawn.argument_is_json else []
    try:
        os.execv(python, command)
    except OSError as error:
        print(f"cannot run python = {python!r}: {error}", file=sys.stderr, flush=True)
        os._exit(EXEC_FAILED)


def link_our_packages(folder: Path) -> None:
    """Fill `folder` with links to our packages.

    The folder that holds them may be a whole site-packages, whose other distributions must not
    shadow what the other interpreter has installed.
    """
    folder.mkdir(exist_ok=True)
    for name in OUR_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            continue
        target = os.path.realpath(spec.submodule_search_locations[0])
        link = folder / name
        if link.is_symlink() and os.readlink(link) == target:
            continue
        fresh = folder / f".{name}.{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)  # in one step: an actor may be starting right now
