"""A real flowd for a test: started, asked, killed and stopped as a user would, in a state directory of its own."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forked import run_forked

from flowd import lockfile
from flowd.client import ControlClient
from flowd.control import ENDED
from flowd.job import dump_job, load_job
from flowd.linux import alive, process_start_time
from flowd.paths import RunPaths, StatePaths
from flowd.processes import SOCKET_NAME
from flowd.watched import Watched
from flowd.zygote_messages import TAG_VARIABLE

HERE = Path(__file__).parent
FAST = HERE / "fast.toml"
DEADLINE_S = 60.0
LOOK_S = 0.02  # between two looks at files of processes that cannot be waited for
MODULES = {"flowd": "flowd", "flowctl": "flowd.flowctl"}
COMPUTING = ("run", "eval", "export")  # commands that load torch; the others start fast


class Flowd:
    """One state directory, with a flowd or without."""

    def __init__(self, root: Path) -> None:
        self.paths = StatePaths(root)
        self.pid = 0

    # Commands as typed.

    def command(
        self,
        program: str,
        *words: str,
        stdin: str = "",
        timeout_s: float = DEADLINE_S,
        cold: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run `flowd …` or `flowctl …` on the state directory to its end.

        cold: in a fresh interpreter also where that takes seconds
        """
        if words[0] in COMPUTING and not cold:
            line = self.module_line(program, *words)
            return run_forked(*line, env=environment(), stdin=stdin, timeout_s=timeout_s)
        return subprocess.run(
            self.command_line(program, *words),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment(),
        )

    def command_line(self, program: str, *words: str) -> list[str]:
        return [sys.executable, "-m", *self.module_line(program, *words)]

    def module_line(self, program: str, *words: str) -> list[str]:
        """What follows `python -m`, for `Forked`."""
        return [MODULES[program], *words, "--state-dir", str(self.paths.root)]

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.command("flowctl", *words)

    def ctl_json(self, *words: str) -> Any:
        """The data of a command that must succeed."""
        done = self.ctl(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def up(self, *options: str, devices: str = "cpu:12") -> None:
        done = self.command("flowd", "up", "--detach", "--json", "--devices", devices, *options)
        assert done.returncode == 0, done.stderr
        self.pid = json.loads(done.stdout)["pid"]

    def down(self) -> None:
        done = self.command("flowd", "down")
        assert done.returncode == 0, done.stderr
        self.pid = 0

    def kill(self) -> None:
        """kill -9 flowd itself, and wait until it is gone."""
        kill(self.pid)
        self.pid = 0

    # Jobs.

    def request(self, command: str, **arguments: Any) -> Any:
        with ControlClient(self.paths) as client:
            return client.request(command, arguments, timeout_s=DEADLINE_S)

    def submit(self, name: str, *changes: str) -> None:
        """Submit the fast job under a name, with changes as for --set."""
        config = load_job(FAST, [*changes, f"job.name={name}"])
        self.request("submit", toml=dump_job(config), source=str(FAST))

    def status(self, job: str) -> dict[str, Any]:
        found: dict[str, Any] = self.request("status", job=job)
        return found

    def actors(self, job: str, kind: str = "") -> list[dict[str, Any]]:
        return [a for a in self.status(job)["actors"] if kind in ("", a["kind"])]

    def pid_of(self, job: str, actor: str) -> int:
        (pid,) = (a["pid"] for a in self.actors(job) if a["name"] == actor)
        return int(pid)

    def wait_until(
        self, job: str, reached: Callable[[Watched], bool], deadline_s: float = DEADLINE_S
    ) -> Watched:
        """Follow a job until something is so; fails when it ends before, or at the deadline."""
        watched = Watched(job)
        give_up_at = time.monotonic() + deadline_s
        with ControlClient(self.paths) as client:
            arguments = {"job": job, "follow": True}
            for update in client.follow("status", arguments, idle_s=0.5):
                if update is not None:
                    watched.apply(update)
                if watched.state and reached(watched):
                    return watched
                assert watched.state not in ENDED, watched.status()
                assert time.monotonic() < give_up_at, (watched.status(), watched.actors)
        raise AssertionError(f"the stream of updates ended early: {watched.status()}")

    def wait_step(self, job: str, step: int) -> None:
        self.wait_until(job, lambda watched: watched.step >= step)

    def wait_done(self, job: str, deadline_s: float = DEADLINE_S) -> None:
        self.wait_until(job, lambda watched: watched.state == "done", deadline_s)

    # What a job wrote.

    def run(self, job: str) -> RunPaths:
        return self.paths.run(job)

    def metrics(self, job: str) -> list[dict[str, Any]]:
        return list(lines_of(self.run(job).metrics))

    def steps(self, job: str) -> list[dict[str, Any]]:
        """The line of every step's last attempt, in order."""
        by_step = {line["step"]: line for line in self.metrics(job) if "groups" in line}
        return [by_step[step] for step in sorted(by_step)]

    def audit(self, job: str) -> dict[str, int]:
        """The counts of a ledger that `flowctl audit` must find sound."""
        done = self.ctl("audit", job, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        counts: dict[str, int] = json.loads(done.stdout)["counts"]
        return counts

    def check_done(self, job: str, *, steps: int, groups_per_step: int = 8) -> list[dict[str, Any]]:
        """A job that is done trained every group once; returns the line of every step's last attempt."""
        assert self.status(job)["state"] == "done"
        counts = self.audit(job)
        assert counts["committed"] == steps * groups_per_step, counts
        assert counts["pending"] == 0, counts
        lines = self.steps(job)
        assert [line["step"] for line in lines] == list(range(steps))
        trained = [group for line in lines for group in line["group_ids"]]
        filtered = counts.get("discarded_filtered", 0)  # left out, with others in their place
        assert len(set(trained)) == len(trained) == steps * groups_per_step
        assert max(trained) < steps * groups_per_step + filtered
        return lines

    # What runs.

    def processes(self) -> dict[int, str]:
        """Zygote, actors and whatever they started: pid to command line."""
        tag = f"{TAG_VARIABLE}={self.paths.sockets / SOCKET_NAME}".encode()
        return {pid: _command_line(pid) for pid in _pids() if tag in _environment(pid)}

    def wait_gone(self, deadline_s: float = 20.0) -> None:
        """Wait until nothing of this flowd runs."""
        wait_for(lambda: not self.processes(), "the zygote and its actors to leave", deadline_s)

    def left_behind(self) -> list[str]:
        """What a stopped flowd must not leave: processes, shared memory, sockets."""
        left = [f"process {pid}: {text}" for pid, text in self.processes().items()]
        places = [self.paths.weights, *self.paths.sockets.glob("*.sock")]
        places += [p for p in self.paths.sockets.iterdir() if p.is_socket()]
        return left + [str(place) for place in places if place.exists()]

    def close(self) -> None:
        """Stop flowd, if it runs; afterwards nothing may be left."""
        try:
            if self.is_up():
                self.down()
            left = self.left_behind()
            assert not left, left
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)

    def is_up(self) -> bool:
        return lockfile.holder(self.paths.lock) is not None


def environment() -> dict[str, str]:
    """Of everything started here: the tests' own tasks can be imported, one thread a process."""
    path = os.pathsep.join([str(HERE / "tasks"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}


def wait_for(reached: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Look until something is so: for files and processes that nothing here can wait for."""
    give_up_at = time.monotonic() + deadline_s
    while not reached():
        assert time.monotonic() < give_up_at, f"waited {deadline_s:g} s for {what}"
        time.sleep(LOOK_S)


def kill(pid: int, signum: int = signal.SIGKILL, deadline_s: float = 10.0) -> None:
    """Send a signal to a process and wait until it is gone."""
    start_time = process_start_time(pid)
    assert start_time is not None, f"process {pid} is gone already"
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signum)
        ended, _, _ = select.select([descriptor], [], [], deadline_s)
        assert ended, f"process {pid} is still there {deadline_s:g} s after signal {signum}"
    finally:
        os.close(descriptor)
    assert not alive(pid, start_time)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, without a line that is being written."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "gone"
