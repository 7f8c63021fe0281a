"""Inline mode: every actor of a job in one event loop of one process, no daemon, no copies.

The actors, the conversation with flowd, leases, ledger and checkpoints are those of the real thing; blocking work runs
on the loop, so a debugger, a profiler and `breakpoint()` work in any stage.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from actors.job_config import JobConfig
from channels.inline import InlineHub
from channels.lifecycle import ActorSpec, Failed
from channels.messages import Message
from flowd.actor_record import Process
from flowd.devices import inventory
from flowd.jobs import Job
from flowd.leases import LeaseTable
from flowd.leasing import LeaseShell
from flowd.paths import JobPlaces
from flowd.planner import plan, stage_devices

DEBUGGER_QUIT = "bdb.BdbQuit"
Emit = Callable[[str, dict[str, Any]], None]


class InlineProcess:
    """An actor that is a task of this loop."""

    def __init__(self, host: Any, endpoint: Any) -> None:
        self.pid = os.getpid()
        self._task = asyncio.create_task(host.main(), name=host.spec.actor)
        self.exited: asyncio.Future[Any] = asyncio.create_task(self._wait(endpoint))

    async def _wait(self, endpoint: Any) -> str:
        outcome = (await asyncio.gather(self._task, return_exceptions=True))[0]
        await asyncio.sleep(0)  # what the actor said last is delivered first
        endpoint.close()
        return f"ended with {outcome!r}"

    def kill(self) -> None:
        """The nearest thing to a kill: cancelled at its next await."""
        self._task.cancel()


async def run_inline(config: JobConfig, run_dir: Path, cache_dir: Path, emit: Emit) -> Job:
    """Run a job to its end and return it; emit(kind, data) is called for every event."""
    # The actor room is loaded by name: flowd itself stays free of torch.
    host_class = import_module("actors.host").ActorHost
    hub = InlineHub()
    endpoint = hub.endpoint("flowd")
    count = sum(stage_devices(config).values())
    devices = inventory(f"cpu:{count}")
    leases = LeaseShell(LeaseTable({device.id: device.memory_bytes for device in devices}))
    weights_dir = Path(tempfile.mkdtemp(prefix="flowd-inline-"))

    async def spawn(spec: ActorSpec, python: str | None) -> Process:
        own = hub.endpoint(spec.peer)
        return InlineProcess(host_class(spec, own, inline=True), own)

    job = Job(
        config.job.name,
        config,
        plan(config, devices),
        devices,
        endpoint=endpoint,
        leases=leases,
        spawn=spawn,
        places=JobPlaces(
            run_dir=run_dir, socket_dir=run_dir, weights_dir=weights_dir, cache_dir=cache_dir
        ),
        node="inline",
        incarnation="inline",
        emit=emit,
        on_end=lambda job: None,
    )

    debugger_quit = asyncio.Event()

    def receive(sender: str, message: Message, payload: Any) -> None:
        job.receive(sender.rpartition("/")[2], message)
        if isinstance(message, Failed) and message.error.startswith(DEBUGGER_QUIT):
            debugger_quit.set()  # else the actor would be started again, up to its next breakpoint

    endpoint.on_message = receive
    try:
        await job.start()
        waits = [asyncio.create_task(event.wait()) for event in (job.ended, debugger_quit)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
    finally:
        if not job.ended.is_set():
            why = "the debugger was quit" if debugger_quit.is_set() else "interrupted"
            await job.end("cancelled", why)
        leases.close()
        endpoint.close()
        shutil.rmtree(weights_dir, ignore_errors=True)
    return job
