"""What flowctl's requests become inside flowd: one call of a command's daemon half, one reply.

Knows no socket: the daemon receives a CtlRequest and calls `ControlDesk.take` in a task of its own.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from actors.job_config import JobConfig
from channels.control import CtlProgress, CtlReply, CtlRequest
from channels.errors import PeerLost
from flowd.command_line import CTL_COMMANDS, DAEMON_COMMANDS, command_module
from flowd.errors import FlowdError, RequestError

ENDED = frozenset({"done", "failed", "cancelled", "interrupted"})
KEPT_REPLIES = 256  # a client that asks again does so within seconds
log = logging.getLogger(__name__)

Send = Callable[[CtlProgress | CtlReply], Awaitable[None]]
"""Puts a message on its way to the client that asked; PeerLost when that client is gone."""


class Daemon(Protocol):
    """What the daemon halves of commands ask for. Wrong requests raise RequestError.

    A job's status has name, state ("starting", "running", "done", "failed", "cancelled",
    "interrupted"), step, steps, policy_version, reward_mean, staleness_max, tokens_per_s, attempt,
    error (the traceback, or reason, that ended the job; None otherwise) and actors: a list of name,
    kind, pid, node, devices, state, restarts, waits_for and time ({"work": seconds,
    "wait_…": seconds, …}, since the actor's start).
    """

    async def submit(self, name: str, config: JobConfig, toml_text: str) -> dict[str, Any]:
        """Start a job; returns its status at once."""
        ...

    def jobs(self) -> list[dict[str, Any]]:
        """The status of every job, without actors, oldest first."""
        ...

    def status(self, job: str) -> dict[str, Any]:
        """UnknownJob when there is none of this name."""
        ...

    def channels(self, job: str) -> list[dict[str, Any]]:
        """The edges of a running job, as its actors told in their last heartbeats: see `flowd.edges`."""
        ...

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job; returns its status once its actors are gone."""
        ...

    async def resume(self, job: str, toml_text: str | None = None) -> dict[str, Any]:
        """Start an ended job from its last commit, with changes where they are given; returns its status at once."""
        ...

    async def scale(
        self, job: str, stage: str, change: str, from_stage: str | None
    ) -> dict[str, Any]:
        """Carry out `flowctl scale` to its end. change: as for `flowd.planner.plan_scale`.

        Keys: seconds_total, seconds_drain, seconds_ready, seconds_first_output, started, stopped.
        """
        ...

    def devices(self) -> list[dict[str, Any]]:
        """The fields of `flowd.devices.Device`, and `holders`: a list of "JOB/REPLICA"."""
        ...

    def nodes(self) -> list[dict[str, Any]]: ...

    def events(self, job: str | None, after_id: int, limit: int) -> list[dict[str, Any]]:
        """Events with id > after_id, oldest first: id, time (unix seconds), job, kind, and more."""
        ...

    def subscribe(self, job: str | None) -> AsyncIterator[dict[str, Any]]:
        """Updates from this call on (not from the first `anext`); None is every job.

        {"event": "step", "job": …, "metrics": a line of metrics.jsonl},
        {"event": "actor", "job": …, and the keys of an actor's status},
        {"event": "job", "job": …, "state": …, "error": …}.
        """
        ...

    def request_shutdown(self) -> None:
        """Ask for an orderly end; returns at once."""
        ...


class ControlDesk:
    """Carries out requests, each id once: a repeated one gets the first one's reply."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._running: dict[str, asyncio.Future[CtlReply]] = {}
        self._done: OrderedDict[str, CtlReply] = OrderedDict()

    async def take(self, request: CtlRequest, send: Send) -> None:
        """Carry a request out and send its reply. Returns quietly when the client has left."""
        try:
            if request.follow:
                reply = await self._follow(request, send)
            else:
                reply = await self._once(request)
            await send(reply)
        except PeerLost:
            log.info("client_left command=%s request=%s", request.command, request.request_id)

    async def _once(self, request: CtlRequest) -> CtlReply:
        known = self._done.get(request.request_id)
        if known is not None:
            return known
        running = self._running.get(request.request_id)
        if running is not None:
            return await asyncio.shield(running)
        future = asyncio.get_running_loop().create_future()
        self._running[request.request_id] = future
        try:
            reply = await self._reply(request, self._handle(request))
            future.set_result(reply)
        finally:
            future.cancel()  # of effect only if this task was cancelled: whoever waits is told
            del self._running[request.request_id]
        self._done[request.request_id] = reply
        if len(self._done) > KEPT_REPLIES:
            self._done.popitem(last=False)
        return reply

    async def _handle(self, request: CtlRequest) -> Any:
        return await self._half(request, "handle")(self._daemon, request.arguments)

    async def _follow(self, request: CtlRequest, send: Send) -> CtlReply:
        async def forward() -> None:
            updates = self._half(request, "stream")(self._daemon, request.arguments)
            try:
                async for data in updates:
                    await send(CtlProgress(request_id=request.request_id, data=data))
            finally:
                await updates.aclose()  # ends the subscription when the client left

        return await self._reply(request, forward())

    def _half(self, request: CtlRequest, half: str) -> Any:
        known = request.command in CTL_COMMANDS + DAEMON_COMMANDS
        found = getattr(command_module(request.command), half, None) if known else None
        if found is None:
            raise RequestError(
                f"flowd knows no command {request.command!r} to {half}: "
                "flowctl and flowd are of different versions; restart flowd"
            )
        return found

    async def _reply(self, request: CtlRequest, work: Awaitable[Any]) -> CtlReply:
        try:
            data = await work
        except FlowdError as error:
            return CtlReply(
                request_id=request.request_id,
                ok=False,
                exit_code=error.exit_code,
                error=str(error),
            )
        except PeerLost:
            raise
        except Exception as error:  # the outermost line of a command: report, and keep flowd alive
            log.exception("command_failed command=%s", request.command)
            sentence = f"{request.command} failed inside flowd: {type(error).__name__}: {error}"
            return CtlReply(
                request_id=request.request_id,
                ok=False,
                exit_code=1,
                error=f"{sentence}; the traceback is in flowd.log",
            )
        return CtlReply(request_id=request.request_id, ok=True, exit_code=0, data=data)
