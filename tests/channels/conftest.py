"""Loops, peers in other processes, and short addresses for the channel tests."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from channel_peers import DEADLINE_S, Peer, Run


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
