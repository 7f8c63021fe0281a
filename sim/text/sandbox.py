"""Runs Python programs that nobody trusts, each in a cage of its own, and says how each of its tests ended.

A cage is a set of Linux namespaces (no network, a file system and processes of its own), a user or user namespace
without rights, limits of the kernel, and a filter of system calls; `sim.text.sandbox_child` builds it. Which of that
this machine grants is found out when a `Sandbox` is made, by a program that tries to get out.

What is not bounded is the sum of memory: it is at most `processes` times `memory_mb`, plus `disk_mb`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import SimError

CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
FOLDER = "/flowd-program"  # as the child has it
ROOTS = ("/mnt", "/media", "/var", "/tmp", "/dev/shm", "/home")  # to put a cage's file system on
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
GRACE_S = 10.0  # beyond its own limit, until a run that does not answer is killed from outside
MIB = 1 << 20

# Tries what must not succeed, and prints what did.
PROBE = """
import json, mmap, os, signal, socket
facts = json.loads(input())
found = []
def attempt(name, function):
    try:
        function()
    except (OSError, MemoryError, ValueError):
        return
    found.append(name)
def connect():
    with socket.create_connection(tuple(facts["address"]), timeout=1):
        pass
def read():
    with open(facts["file"]) as file:
        file.read()
def fork():
    for _ in range(facts["processes"] + 1):
        if os.fork() == 0:
            signal.pause()
def write():
    with open("large", "wb") as file:
        file.truncate(facts["file_bytes"] + 1)
def scatter():
    for number in range(facts["files"] + 1):
        open(f"small{number}", "w").close()
attempt("network", connect)
attempt("files", read)
attempt("processes", lambda: os.kill(facts["pid"], 0))
attempt("memory", lambda: mmap.mmap(-1, facts["memory_bytes"] + 1))
attempt("disk", write)
attempt("many", scatter)
attempt("fork", fork)  # last: nothing can be started after it
print(json.dumps(found))
"""
GAPS = {
    "network": "reach the network",
    "files": "read this machine's files",
    "processes": "see and signal this user's processes",
    "fork": "start processes without limit",
    "memory": "take memory without limit",
    "disk": "write files without limit",
    "many": "make files without limit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use; each limit is the kernel's.

    timeout_s: of one test, in seconds of the clock, and of each process's computing; total_s: of all tests of a program
    memory_mb: address space of each process; processes: processes and threads at a time
    file_mb: size of one file; disk_mb: of all files, which are in memory; files: how many, folders included
    output_kb: of standard output
    """

    timeout_s: float = 5.0
    total_s: float = 30.0
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    disk_mb: int = 32
    files: int = 256
    output_kb: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be more than 0")
        if self.memory_mb < 64:
            raise ValueError(f"memory_mb = {self.memory_mb}: Python itself needs 64")

    def in_bytes(self) -> dict[str, float]:
        """As the child takes them."""
        return {
            "timeout_s": self.timeout_s,
            "total_s": self.total_s,
            "memory_bytes": self.memory_mb * MIB,
            "processes": self.processes,
            "file_bytes": self.file_mb * MIB,
            "disk_bytes": self.disk_mb * MIB,
            "files": self.files,
            "output_bytes": self.output_kb * 1024,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Code that runs after the program, in its names, or text for the program's standard input."""

    code: str | None = None
    input: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a test ended. reason: "" where program and code came to their end, else what ended them."""

    reason: str
    output: str


class SandboxError(SimError):
    """Raised when programs cannot be run, or not safely."""


class Sandbox:
    """Runs programs, several at a time when called from several threads.

    packages: whether programs may import what is installed beside the interpreter; else the standard library only
    allow_unprotected: run them also where a protection is missing; `missing` then says what they can do

    SandboxError: a protection is missing. Needs Linux.
    """

    def __init__(
        self, limits: Limits, *, packages: bool = False, allow_unprotected: bool = False
    ) -> None:
        self._limits = limits
        self._packages = packages
        self._namespaces = True
        self.missing = ""
        if sys.platform != "linux":
            raise SandboxError(f"programs are run on Linux only, and this is {sys.platform}")
        gaps, why = self._find_gaps()
        if gaps is None and allow_unprotected:
            # Namespaces could be entered, but not furnished.
            self._namespaces = False
            gaps, second = self._find_gaps()
            why = f"{why}; {second}"
        if gaps is None:
            raise SandboxError(f"programs cannot be run: {why}")
        if gaps:
            able = ", ".join(GAPS[gap] for gap in gaps)
            self.missing = f"programs can {able} here (namespaces: {why or 'granted'})"
            if not allow_unprotected:
                raise SandboxError(
                    f"{self.missing}: allow user namespaces (sysctl user.max_user_namespaces, "
                    "kernel.apparmor_restrict_unprivileged_userns = 0; in a container a seccomp profile "
                    "that permits unshare and mount), or set allow_unprotected = true"
                )

    def run(
        self, program: str, tests: Sequence[Trial], *, stop_at_first: bool = False
    ) -> list[Outcome]:
        """Run each test with the program anew; fewer outcomes than tests where the time was out, or a failure stops.

        When this returns nothing of the program is left: no process, no file.
        SandboxError: the cage itself failed.
        """
        answer = self._ask(program, tests, stop_at_first)
        if answer["results"] is None:
            raise SandboxError(f"programs cannot be run: {answer['why']}")
        return [
            Outcome(reason="" if each["ended_well"] else each["reason"], output=each["output"])
            for each in answer["results"]
        ]

    def _ask(self, program: str, tests: Sequence[Trial], stop_at_first: bool) -> dict[str, Any]:
        request = {
            "program": program,
            "tests": [
                {"input": test.input} if test.code is None else {"code": test.code}
                for test in tests
            ],
            "limits": self._limits.in_bytes(),
            "stop_at_first": stop_at_first,
            "namespaces": self._namespaces,
            "visible": (visible := visible_paths(self._packages)),
            "root": next(
                path
                for path in ROOTS
                if os.path.isdir(path) and not any(_within(each, path) for each in visible)
            ),
            "temporary": tempfile.gettempdir(),
        }
        base = getattr(sys, "_base_executable", "") or sys.executable
        python = sys.executable if self._packages else base
        words = [python, "-P", "-s", "-B", *(() if self._packages else ("-S",))]
        child = subprocess.Popen(
            [*words, str(CHILD), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={
                "PATH": "/usr/local/bin:/usr/bin:/bin",
                "HOME": FOLDER,
                "LANG": "C.UTF-8",
                "PYTHONUTF8": "1",
                "PYTHONHASHSEED": "0",  # the same program, the same output
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,
        )
        with child:
            try:
                out, err = child.communicate(
                    json.dumps(request).encode(), timeout=self._limits.total_s + GRACE_S
                )
            except BaseException as error:
                child.kill()  # and with it, by the kernel, all that it started
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                child.communicate()
                raise SandboxError(
                    f"a run did not answer within {self._limits.total_s + GRACE_S:g} s"
                ) from error
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError:
            told = err.decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
            raise SandboxError(f"a run ended with {child.returncode}: {told[0]}") from None
        return answer

    def _find_gaps(self) -> tuple[list[str] | None, str]:
        """(what a program is able to do and should not, why there are no namespaces); None: it cannot be run."""
        with (
            tempfile.TemporaryDirectory(prefix="flowd-probe-") as folder,
            socket.create_server(("127.0.0.1", 0)) as server,
        ):
            os.chmod(folder, 0o755)
            file = Path(folder, "canary")
            file.write_text("")
            facts = {
                "address": server.getsockname(),
                "file": str(file),
                "pid": os.getpid(),
                **self._limits.in_bytes(),
            }
            answer = self._ask(PROBE, [Trial(input=json.dumps(facts))], False)
        if answer["results"] is None:
            return None, answer["why"]
        (result,) = answer["results"]
        if not result["ended_well"]:
            return None, f"{result['reason']} {answer['why']}".strip()
        return json.loads(result["output"]), answer["why"]


def visible_paths(packages: bool) -> list[str]:
    """What a program may read: the interpreter, the system's programs and libraries; no path lies within another."""
    prefixes = {os.path.realpath(sys.base_prefix), *((sys.prefix,) if packages else ())}
    paths = [path for path in (*SYSTEM, *sorted(prefixes)) if path != "/"]
    return [
        path
        for path in dict.fromkeys((*paths, *DEVICES))
        if not any(path != other and _within(path, other) for other in paths)
    ]


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")
