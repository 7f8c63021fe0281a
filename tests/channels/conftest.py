"""Loops, webs, peers in other processes, and short addresses for the channel tests."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvloop
from channel_peers import DEADLINE_S, TRANSPORTS, MakeWeb, Peer, Run, Start, Web

from channels.tensors import device_frames


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


@pytest.fixture(params=TRANSPORTS)
def web(
    request: pytest.FixtureRequest, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeWeb]:
    """Makes a web of routers on one transport, within a running loop. When closed it leaves no arena.

    On devices every payload has a small tensor beside it.
    """
    webs: list[Web] = []
    monkeypatch.setattr(device_frames, "ON_DEVICE_FROM_BYTES", 1)

    def make(**options: Any) -> Web:
        webs.append(Web(request.param, sockets, laden=True, **options))
        return webs[-1]

    yield make
    for made in webs:
        ours = {quote(name, safe="") for name in made.routers}
        left = [path.name for path in made.shared.glob("*.arena")]
        assert not [file for file in left if file.split(".")[0] in ours]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts peers, and stops them at the end."""
    peers: list[Peer] = []

    def starter(role: str, *args: str, **environment: str) -> Peer:
        peers.append(Peer(role, *args, **environment))
        return peers[-1]

    yield starter
    for peer in peers:
        peer.stop()
