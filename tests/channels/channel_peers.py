"""What the channel tests share: peers in other processes, and the type of the `run` fixture."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

DEADLINE_S = 30.0
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Peer:
    """A child process that runs a role of `peer_process.py`."""

    def __init__(self, role: str, *args: str) -> None:
        script = str(Path(__file__).with_name("peer_process.py"))
        self.process = subprocess.Popen(
            [sys.executable, script, role, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def says(self) -> str:
        """The next line on its stdout, "" at its end."""
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        return line.strip()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it end on its own."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=DEADLINE_S)
        finally:
            self.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()
