"""The daemon's fork server: there when an actor is to be started, adopted or replaced when it is lost.

`processes` talks to one zygote for one life of it; this knows which one is current, and what an actor process of ours
is started with.
"""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from channels.lifecycle import ActorSpec
from flowd.actor_record import Process
from flowd.devices import Device
from flowd.paths import StatePaths
from flowd.processes import (
    DEFAULT_PRELOAD,
    SOCKET_NAME,
    ProcessHandle,
    ZygoteClient,
    ZygoteLost,
)
from flowd.tasks import Tasks

log = logging.getLogger(__name__)

ACTOR_ENTRY = "actors.main:run"
PRELOAD = (
    *DEFAULT_PRELOAD,
    "actors.conductor.actor",
    "actors.env.actor",
    "actors.rollout.actor",
    "actors.inference.actor",
    "actors.trainer.actor",
    "actors.trainer.building",
    "actors.backends.hf_engine",
    "actors.inference.building",
    "actors.models.text_policy",
    "torch.utils.tensorboard.writer",
)


class ForkServer:
    """One per flowd. `adopt` takes over what the last flowd left, `replace` ends that and starts a new one."""

    def __init__(
        self, paths: StatePaths, devices: Sequence[Device], tasks: Tasks, orphan_grace_s: float
    ) -> None:
        self._paths = paths
        self._devices = devices
        self._tasks = tasks
        self._orphan_grace_s = orphan_grace_s
        self._current: asyncio.Task[ZygoteClient] | None = None
        self._closing = False

    async def adopt(self) -> list[ProcessHandle]:
        """The actors of a fork server whose flowd is gone; none where there is no such server."""
        client = ZygoteClient(self._lost)
        try:
            actors = await client.adopt(self._paths.sockets / SOCKET_NAME)
        except ZygoteLost:
            return []
        self._current = self._tasks.start(_value(client), "zygote")
        return actors

    async def replace(self) -> None:
        """End the one that was adopted, if any; a new one starts beside whatever else is done."""
        if self._current is not None:
            await (await self._current).stop()
        self._begin()

    async def stop(self, *, at_once: bool = False) -> None:
        """End it with all actors. at_once: there are none, so it need not come up to be stopped."""
        self._closing = True
        if self._current is None:
            return
        if at_once:
            self._current.cancel()  # of effect only while it still imports
        outcome = (await asyncio.gather(self._current, return_exceptions=True))[0]
        if isinstance(outcome, ZygoteClient):
            await outcome.stop()

    async def spawn(self, spec: ActorSpec, python: str | None) -> Process:
        """Start an actor. Raises SpawnError or ZygoteLost."""
        if self._current is None or (self._current.done() and self._current.exception()):
            self._begin()  # the last try failed
        assert self._current is not None
        client = await asyncio.shield(self._current)
        devices = [device for device in self._devices if device.id in spec.devices]
        handle = await client.spawn(
            ACTOR_ENTRY,
            msgspec.msgpack.encode(spec),
            name=spec.actor,
            log_path=Path(spec.run_dir) / "logs" / f"{spec.actor}.log",
            environment={
                # GPUs by UUID: numbers depend on CUDA_DEVICE_ORDER. Actors without one see none.
                "CUDA_VISIBLE_DEVICES": ",".join(d.uuid for d in devices if d.uuid),
                "FLOWD_TORCH_THREADS": str(spec.threads),
            },
            python=python,
        )
        return ForkedProcess(handle)

    def _begin(self) -> None:
        self._current = self._tasks.start(self._start(), "zygote")

    async def _start(self) -> ZygoteClient:
        client = ZygoteClient(self._lost)
        await client.start(self._paths.root, PRELOAD, self._orphan_grace_s)
        return client

    def _lost(self, reason: str) -> None:
        """It died, and with it every actor: start another, jobs go on from there."""
        if not self._closing:
            log.error("zygote lost: %s", reason)
            self._begin()


class ForkedProcess:
    """A process of the fork server, as a job sees it."""

    def __init__(self, handle: ProcessHandle) -> None:
        self.pid = handle.pid
        self.exited: asyncio.Future[Any] = handle.exited
        self._handle = handle

    def kill(self) -> None:
        with contextlib.suppress(ZygoteLost):  # then it is dead already
            self._handle.signal(signal.SIGKILL)


async def _value(client: ZygoteClient) -> ZygoteClient:
    return client
