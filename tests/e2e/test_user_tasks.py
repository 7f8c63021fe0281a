"""Tasks and interpreters of a user's own: errors reach the user, the debugger works, another python serves a stage."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from flowd_process import FAST, Flowd


def test_traceback_of_a_task_that_raises_reaches_the_user_first(flowd: Flowd) -> None:
    """`submit --follow` ends with exit code 1 and shows the task's own traceback; the job leaves nothing running."""
    name = "raises"
    done = flowd.ctl(
        "submit",
        str(FAST),
        "--follow",
        "--set",
        f"job.name={name}",
        "--set",
        "env.task=e2e_tasks:Raises",
    )
    assert done.returncode == 1
    told = done.stderr.splitlines()
    first = told.index("Traceback (most recent call last):")
    assert told[-1].startswith("error: ")
    assert "ZeroDivisionError: the abacus is broken" in told[-1]
    assert "e2e_tasks.py" in "".join(told[first:-1])
    assert "ZeroDivisionError: the abacus is broken" in told[first:-1]
    assert "Group" not in "".join(told[first:]), "not one of the groups it was wrapped in"

    status = flowd.status(name)
    assert status["state"] == "failed"
    assert status["error"].startswith("Traceback (most recent call last):")
    shown = flowd.ctl("status", name)
    assert shown.returncode == 0
    assert shown.stdout.startswith("Traceback (most recent call last):")
    logs = flowd.ctl("logs", name)
    assert "the abacus is broken" in logs.stdout
    pids = {actor["pid"] for actor in status["actors"]}
    assert len(pids) == 6, status
    assert not pids & flowd.processes().keys()
    flowd.audit(name)


def test_task_that_is_not_there_fails_at_once(flowd: Flowd) -> None:
    """What cannot be set up is not tried again and again."""
    done = flowd.ctl(
        "submit",
        str(FAST),
        "--follow",
        "--set",
        "job.name=absent",
        "--set",
        "env.task=nowhere:Task",
    )
    assert done.returncode == 1
    assert "there is no module nowhere" in done.stderr.splitlines()[-1]
    assert all(actor["restarts"] == 0 for actor in flowd.actors("absent"))
    # Some were killed before their first message.
    sockets = {path.name for path in flowd.paths.sockets.iterdir() if path.is_socket()}
    assert sockets == {"control.sock", "flowd.sock", "zygote.sock"}


def empty_environment(place: Path) -> tuple[Path, Path]:
    """A virtual environment with nothing in it: its python, and the folder of its packages."""
    python = place / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(os.path.realpath(sys.executable))
    (place / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    packages = place / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    return python, packages


def test_another_interpreter_serves_the_env_stage(flowd: Flowd, tmp_path: Path) -> None:
    """[env] python names a virtual environment, without torch here; its actors run there, the others in flowd's."""
    python, packages = empty_environment(tmp_path / "venv")
    for module in ("msgpack", "msgspec", "numpy", "uvloop", "zmq"):
        (package,) = find_spec(module).submodule_search_locations
        for place in (Path(package), *Path(package).parent.glob(f"*{module}.libs")):
            (packages / place.name).symlink_to(place)
    absent = subprocess.run([python, "-c", "import torch"], capture_output=True, check=False)
    assert b"No module named 'torch'" in absent.stderr
    flowd.submit("interpreter", f"env.python={python}", "job.steps=100000")
    flowd.wait_step("interpreter", 2)
    commands = {actor["name"]: _command(actor["pid"]) for actor in flowd.actors("interpreter")}
    for name, command in commands.items():
        assert command.startswith(str(python)) == name.startswith("env-"), command
    assert flowd.ctl("cancel", "interpreter").returncode == 0
    flowd.audit("interpreter")


def test_interpreter_that_lacks_packages_is_told_by_its_last_line(
    flowd: Flowd, tmp_path: Path
) -> None:
    """Such an actor ends before it can speak: its log has the traceback, shown from the first line."""
    python, _ = empty_environment(tmp_path / "venv")
    options = ["--set", "job.name=bare", "--set", f"env.python={python}", "--set", "env.actors=1"]
    done = flowd.ctl("submit", str(FAST), "--follow", *options)
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert told.count("Traceback (most recent call last):") == 1
    assert "ModuleNotFoundError: No module named 'msgspec'" in told[-1]
    assert flowd.status("bare")["error"].startswith("Traceback (most recent call last):")


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_inline_refuses_what_takes_several_processes(own_flowd: Flowd) -> None:
    """Ranks of a training group would wait for each other for ever on one loop."""
    done = own_flowd.ctl("run", "--inline", str(FAST), "--set", "trainer.devices=2")
    assert done.returncode == 2
    assert "[trainer] devices = 2" in done.stderr
    assert not own_flowd.paths.runs.exists()
