"""What the channel tests share: webs of routers on every transport, and peers in other processes."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from channels.channel import ChannelRouter, Consumer, Producer
from channels.endpoint import MAX_PAYLOAD_BYTES, Endpoint, InlineHub, ZmqEndpoint

DEADLINE_S = 30.0
PROCESS_TRANSPORTS = ("ipc", "shared_memory", "tcp")
TRANSPORTS = ("inline", *PROCESS_TRANSPORTS)
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


Start = Callable[..., Peer]


class Web:
    """Routers that are all connected to each other, on one transport. Made in a running loop."""

    def __init__(
        self, transport: str, directory: Path, max_payload_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self.transport = transport
        self.routers: dict[str, ChannelRouter] = {}
        self.shared = directory / "shared"  # of the arenas
        self._directory = directory
        self._max_payload_bytes = max_payload_bytes
        self._hub = InlineHub(max_payload_bytes=max_payload_bytes)
        self._count = 0

    def router(self, name: str) -> ChannelRouter:
        endpoint = self._endpoint(name)
        for other in self.routers.values():
            endpoint.connect(other.endpoint.name, other.endpoint.address)
            other.endpoint.connect(name, endpoint.address)
        self.routers[name] = ChannelRouter(endpoint)
        return self.routers[name]

    def pair(self, bound: int = 8, capacity: int = 4) -> tuple[Producer, Consumer]:
        """A producer "p" and a consumer "a" that know each other."""
        producer = self.router("p").producer("work", bound=bound)
        return producer, self.consumer("a", capacity)

    def consumer(self, name: str, capacity: int) -> Consumer:
        consumer = self.router(name).consumer("work", capacity=capacity)
        consumer.add_producer("p")
        self.routers["p"].producers["work"].add_consumer(name)
        return consumer

    async def join(self, start: Start, role: str, name: str, *options: str, of: str = "p") -> Peer:
        """A process that plays a role, connected with the router `of`; it has said "ready"."""
        endpoint = self.routers[of].endpoint
        if self.transport == "shared_memory":
            options = ("--shared-dir", str(self.shared), *options)
        peer = start(role, name, self._address(), of, endpoint.address, *options)
        endpoint.connect(name, (await peer.says()).removeprefix("at "))
        assert await peer.says() == "ready"
        return peer

    def lose(self, name: str, of: str = "p") -> None:
        """Tell a router that a process died, as flowd tells the actors that know it."""
        self.routers[of].remove_peer(name)
        self.routers[of].endpoint.disconnect(name)

    def close(self) -> None:
        for router in self.routers.values():
            router.close()
            router.endpoint.close()

    def _endpoint(self, name: str) -> Endpoint:
        if self.transport == "inline":
            return self._hub.endpoint(name)
        return ZmqEndpoint(
            name,
            self._address(),
            max_payload_bytes=self._max_payload_bytes,
            shared_dir=self.shared if self.transport == "shared_memory" else None,
        )

    def _address(self) -> str:
        if self.transport == "tcp":
            return "tcp://127.0.0.1:*"
        self._count += 1
        return f"ipc://{self._directory}/{self._count}"


MakeWeb = Callable[..., Web]


async def settle() -> None:
    """Let the loop turn until what was started has gone as far as it can without the network."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop, one turn at a time, until the condition holds; the fixture has the deadline."""
    for _ in iter(condition, True):
        await asyncio.sleep(0)


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and wait for its end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
