"""Python processes for tests that are there at once: forked from a server that has imported what is slow to import.

Such a process has its own descriptors, environment and terminal, and is killed, interrupted and waited for like any
other. What it does not show is how a program starts in a fresh interpreter: tests of that start one.
"""

import fcntl
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

from flowd.fork_server import PRELOAD as PRELOAD_OF_ACTORS

# Imported once for all; the server is started by whoever needs it first.
PRELOAD = (
    "numpy",  # before torch, as in a program that imports both in the order of their names
    *PRELOAD_OF_ACTORS,
    "actors.host",
    "actors.trainer.export",
    "channels.socket_endpoint",
    "flowd.inline",
    "hypothesis",
    "pytest",
)
FORKS = multiprocessing.get_context("forkserver")


class Forked:
    """`python -m MODULE WORD...`, or `python SCRIPT WORD...` for a path: of subprocess.Popen what tests need of it.

    stdin, stdout: None for those of the tests, a descriptor, or PIPE for a text stream here
    stderr: None or a descriptor
    terminal: stdin becomes the controlling terminal of a session of its own
    """

    def __init__(
        self,
        program: str | Path,
        *words: str,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        terminal: bool = False,
    ) -> None:
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        given = [number if fd is None else fd for number, fd in enumerate((stdin, stdout, stderr))]
        theirs = []
        if stdin == PIPE:
            given[0], end = os.pipe()
            self.stdin = os.fdopen(end, "w")
            theirs.append(given[0])
        if stdout == PIPE:
            end, given[1] = os.pipe()
            self.stdout = os.fdopen(end)
            theirs.append(given[1])
        self._process = FORKS.Process(
            target=_become,
            args=(
                program,
                words,
                dict(os.environ if env is None else env),
                tuple(map(_Descriptor, given)),
                terminal,
            ),
        )
        try:
            self._process.start()
        finally:
            for end in theirs:
                os.close(end)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; -N after signal N."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([self._process.name], timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        """To a process that has ended, none."""
        if self._process.is_alive():
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float | None = None) -> str:
        """Close its stdin and wait for its end; what is left on its stdout."""
        if self.stdin is not None:
            self.stdin.close()
        said = ""
        if self.stdout is not None:
            with self.stdout:
                said = self.stdout.read()
        self.wait(timeout)
        return said

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                stream.close()
        self._process.join()


def run_forked(
    program: str | Path, *words: str, env: Mapping[str, str], stdin: str = "", timeout_s: float
) -> "subprocess.CompletedProcess[str]":
    """Like subprocess.run with all output captured; a process that is late is killed."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out:
        with tempfile.TemporaryFile() as err:
            given.write(stdin.encode())
            given.seek(0)
            fds = {"stdin": given.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
            process = Forked(program, *words, env=env, **fds)
            try:
                code = process.wait(timeout_s)
            finally:
                process.kill()
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode())
    return subprocess.CompletedProcess([str(program), *words], code, *said)


def run_ranks(
    num_ranks: int, work: Callable[..., None], *given: Any, timeout_s: float = 100
) -> None:
    """Call work(rank, *given), a function of a module, in a process for each rank; all must return in time."""
    ranks = [
        FORKS.Process(target=_work_as_rank, args=(work, rank, *given)) for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    try:
        # The others wait for one that failed.
        running = {process.sentinel: process for process in ranks}
        give_up_at = time.monotonic() + timeout_s
        while running and all(process.exitcode in (0, None) for process in ranks):
            ended = wait(list(running), max(0.0, give_up_at - time.monotonic()))
            assert ended, f"{len(running)} of {num_ranks} ranks still run after {timeout_s:g} s"
            for sentinel in ended:
                running.pop(sentinel).join()
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert [process.exitcode for process in ranks] == [0] * num_ranks


def _work_as_rank(work: Callable[..., None], rank: int, *given: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may lead nowhere
    sys.modules["torch"].set_num_threads(1)
    work(rank, *given)


class _Descriptor:
    """An open file on its way into a process that is being started."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (DupFd(self._fd),)


def _detach(descriptor: Any) -> int:
    fd: int = descriptor.detach()
    return fd


def _become(
    program: str | Path,
    words: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
    terminal: bool,
) -> None:
    """Be in the new process what the interpreter would have made of the command line."""
    if terminal:
        os.setsid()
    for number, fd in enumerate(descriptors):
        os.dup2(fd, number)
        os.close(fd)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        # A terminal and stderr by lines, the rest by blocks, as ever.
        by_lines = number == 2 or os.isatty(number)
        stream = os.fdopen(number, "w" if number else "r", 1 if by_lines else -1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()  # what the server imported is never garbage
    os.environ.clear()
    os.environ.update(environment)
    first = [str(program.parent)] if isinstance(program, Path) else []
    sys.path[:0] = [*first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if "OMP_NUM_THREADS" in environment:  # OpenMP has read it already
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [str(program), *words]
    if isinstance(program, Path):
        runpy.run_path(str(program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
