"""The other processes of a bench, and Ray beside it where it is installed.

A role runs in `python -m MODULE --role ROLE ARGUMENTS…`, says "ready" on its stdout, answers each line on its stdin
with a line of JSON, and ends when stdin ends.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
NO_RAY = "ray is not installed here: pip install 'flowd[bench]'"


class Peer:
    """A process that plays a role of a bench's module."""

    def __init__(self, module: str, role: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, "--role", role, *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            self.expect("ready")
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def line(self) -> str:
        """The next line it says. Raises RuntimeError when it has ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")
        return line.strip()

    def expect(self, word: str) -> None:
        """Wait until it says this word. Raises RuntimeError when it says something else."""
        if (line := self.line()) != word:
            raise RuntimeError(f'{self.process.args!r} said "{line}", not "{word}"')

    def tell(self, *words: object) -> None:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def ask(self, *words: object) -> Any:
        """Have it do something, and wait for the answer."""
        self.tell(*words)
        return json.loads(self.line())

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self._gone()

    def stop(self) -> None:
        """Let it end by itself."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it is gone already
        self._gone()

    def _gone(self) -> None:
        assert self.process.stdout is not None
        self.process.wait()
        self.process.stdout.close()


def ready() -> None:
    """Said by a role once it may be measured."""
    print("ready", flush=True)


def start_ray() -> Peer | None:
    """The process that asks Ray (`bench.ray_peer`), None where Ray is not installed."""
    return None if importlib.util.find_spec("ray") is None else Peer("bench.ray_peer", "driver")
