"""Loops, peers in other processes, and short addresses for the channel tests."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

DEADLINE_S = 30.0
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine function to its end on either loop; errors that the loop caught fail the test."""

    def runner(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        caught: list[dict[str, Any]] = []

        async def guarded() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: caught.append(context))
            async with asyncio.timeout(DEADLINE_S):
                await main()

        if request.param == "uvloop":
            uvloop.run(guarded())
        else:
            asyncio.run(guarded())
        assert not caught, caught

    return runner


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A directory whose path is short enough for sockets; all socket files must be gone at the end."""
    with tempfile.TemporaryDirectory(prefix="ch-") as directory:
        yield Path(directory)


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


@pytest.fixture
def start() -> Iterator[Callable[..., Peer]]:
    """Starts peers, and stops them at the end."""
    peers: list[Peer] = []

    def starter(role: str, *args: str) -> Peer:
        peers.append(Peer(role, *args))
        return peers[-1]

    yield starter
    for peer in peers:
        peer.stop()
