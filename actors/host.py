"""What surrounds an actor in its process or loop: the conversation with flowd, heartbeats, the end.

The host owns the actor's tasks. It ends in one of four ways: flowd said `Stop` or the actor's `run` returned (exit
code 0), the actor raised (1, flowd is told the traceback first), or no flowd was heard for `orphan_grace_s` (3).
"""

import asyncio
import logging
import os
import sys
import time
import traceback
from typing import Any

from actors.actor import Actor
from actors.channel_reports import ChannelReports
from actors.lease import Lease
from actors.registry import actor_class
from channels.channel import ChannelRouter
from channels.endpoint import Endpoint
from channels.errors import ChannelError
from channels.lifecycle import (
    FLOWD,
    ActorSpec,
    Failed,
    Forget,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Introduce,
    LeaseBusy,
    LeaseGranted,
    LeaseIdle,
    LeaseReleased,
    LeaseRevoked,
    LeaseWanted,
    Ready,
    Stop,
    Welcome,
    heartbeat_interval_s,
)
from channels.messages import Message
from channels.work import AskCall

EXIT_DONE = 0
EXIT_RAISED = 1
EXIT_ORPHANED = 3
MAX_UNMET = 256  # messages of actors not introduced yet; each says a few before it is

log = logging.getLogger(__name__)


class ActorHost:
    """Runs one actor on an endpoint. inline: shares loop and process with the others, so it sends no heartbeats."""

    def __init__(self, spec: ActorSpec, endpoint: Endpoint, *, inline: bool = False) -> None:
        self.spec = spec
        self.endpoint = endpoint
        self.inline = inline
        self.ready = False
        self.actor: Actor | None = None
        self._router = ChannelRouter(endpoint)
        self._router.on_message = self._on_message
        self._channels = ChannelReports(self._router)
        self._early: list[tuple[str, Message, Any]] = []
        self._unmet: dict[str, list[tuple[Message, Any]]] = {}
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        # Parking and handlers of messages run beside the actor's life; an error there ends it all the same.
        self._broken: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._incarnation = ""
        self._heartbeat_s = heartbeat_interval_s(spec.orphan_grace_s)
        self._heard = time.monotonic()
        self.lease = self._make_lease()

    def _make_lease(self) -> Lease:
        job, actor = self.spec.job, self.spec.actor

        # What is checked is the whole need on a virtual device only: a GPU also holds activations, and what
        # its allocator keeps.
        virtual = all(device.startswith("cpu") for device in self.spec.devices)

        def wanted(most_bytes: int | None) -> None:
            need = most_bytes if virtual else None
            self._tell(LeaseWanted(actor=actor, job=job, memory_bytes=need))

        async def park(offload: bool) -> int:
            return 0 if self.actor is None else await self.actor.park(offload)

        return Lease(
            devices=self.spec.devices,
            memory_limit=self.spec.device_memory_bytes,
            send_wanted=wanted,
            send_idle=lambda epoch: self._tell(LeaseIdle(actor=actor, job=job, lease_epoch=epoch)),
            send_busy=lambda epoch: self._tell(LeaseBusy(actor=actor, job=job, lease_epoch=epoch)),
            send_released=lambda epoch, left: self._tell(
                LeaseReleased(actor=actor, job=job, lease_epoch=epoch, memory_bytes=left)
            ),
            park=park,
            failed=self._break,
            follows=self.spec.rank > 0,
        )

    def stop(self, reason: str, deadline_s: float = 5.0) -> None:
        """Ask the actor to leave, as a `Stop` from flowd would."""
        if not self._stop.done():
            self._stop.set_result(Stop(reason=reason, deadline_s=deadline_s))

    async def main(self) -> int:
        """Live; returns the exit code."""
        self.endpoint.connect(FLOWD, self.spec.flowd_address)
        self._hello()
        beats = None if self.inline else asyncio.create_task(self._beat(), name="heartbeat")
        life = asyncio.create_task(self._live(), name=self.spec.actor)
        waiting: set[asyncio.Future[Any]] = {life, self._stop, self._broken}
        if beats is not None:
            waiting.add(beats)
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                error = life.exception()
                return EXIT_DONE if error is None else self._raised(error)
            if self._broken.done():
                return self._raised(self._broken.result())
            if self._stop.done():
                return await self._leave(life, self._stop.result())
            if beats is not None and (error := beats.exception()) is not None:
                return self._raised(error)
            log.error("orphaned: no flowd for %s s; leaving", self.spec.orphan_grace_s)
            await self._leave(life, Stop(reason="orphaned", deadline_s=3.0))
            return EXIT_ORPHANED
        finally:
            for task in (life, beats):
                if task is not None and not task.done():
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
            if self.actor is not None:
                self.actor.close()

    async def _live(self) -> None:
        cls = actor_class(self.spec.kind)
        if "torch" in sys.modules:
            # Also inline: several computing actors with a thread pool each would fight over the cores.
            # Where torch is not loaded yet, the entry has told its OpenMP.
            sys.modules["torch"].set_num_threads(self.spec.threads)
        self.actor = cls(self.spec, self.endpoint, self._router, self.lease, inline=self.inline)
        early, self._early = self._early, []
        for sender, message, payload in early:
            self._dispatch(sender, message, payload)
        await self.actor.setup()
        self.ready = True
        self._tell(Ready(actor=self.spec.actor, job=self.spec.job, epoch=self.spec.epoch))
        await self.actor.run()
        await self.actor.leave()

    def _raised(self, error: BaseException) -> int:
        """Tell flowd what ended the actor."""
        # Of a group of equal failures (groups played side by side) users want the first, as it was raised.
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = "".join(traceback.format_exception(error))
        log.error("actor=%s raised\n%s", self.spec.actor, text)
        line = traceback.format_exception_only(error)[-1].strip()
        self._tell(
            Failed(
                actor=self.spec.actor,
                job=self.spec.job,
                epoch=self.spec.epoch,
                error=line,
                traceback=text,
                during_setup=not self.ready,
            )
        )
        return EXIT_RAISED

    async def _leave(self, life: "asyncio.Task[None]", stop: Stop) -> int:
        log.info("leaving actor=%s reason=%s", self.spec.actor, stop.reason)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)
        if self.actor is not None and self.ready:  # else it has nothing yet to hand back
            try:
                async with asyncio.timeout(stop.deadline_s):
                    await self.actor.leave()
            except TimeoutError:
                log.warning("actor=%s did not hand back in %s s", self.spec.actor, stop.deadline_s)
            except Exception as error:
                return self._raised(error)
        return EXIT_DONE

    async def _beat(self) -> None:
        """Beat until no flowd was heard for the grace. Time that this process slept through does not count."""
        silent_s = 0.0
        while silent_s < self.spec.orphan_grace_s:
            report: dict[str, Any] = {}
            if self.actor is not None:
                report = {**self.actor.report(), "channels": self._channels.report()}
                self.actor.spans.flush()
            self._tell(
                Heartbeat(
                    actor=self.spec.actor, job=self.spec.job, epoch=self.spec.epoch, report=report
                )
            )
            began = time.monotonic()
            await asyncio.sleep(self._heartbeat_s)
            if self._heard >= began:
                silent_s = 0.0
            else:
                silent_s += min(time.monotonic() - began, 2 * self._heartbeat_s)

    def _hello(self) -> None:
        self._tell(
            Hello(
                actor=self.spec.actor,
                job=self.spec.job,
                epoch=self.spec.epoch,
                pid=os.getpid(),
                address=self.endpoint.address,
                ready=self.ready,
                holding=self.lease.held,
                lease_epoch=self.lease.epoch,
                remote_address=self.endpoint.remote_address,
            )
        )

    def _tell(self, message: Message) -> None:
        try:
            self.endpoint.send(FLOWD, message)
        except ChannelError as error:
            log.warning("flowd was not told %s: %s", type(message).__name__, error)

    def _break(self, error: BaseException) -> None:
        if not self._broken.done():
            self._broken.set_result(error)

    def _on_message(self, sender: str, message: Message, payload: Any) -> None:
        try:
            self._dispatch(sender, message, payload)
        except Exception as error:
            self._break(error)  # the mailbox would log it, and the actor wait for what it missed

    def _dispatch(self, sender: str, message: Message, payload: Any) -> None:
        if sender == FLOWD:
            self._heard = time.monotonic()
        match message:
            case HeartbeatReply():
                pass
            case Welcome():
                self._heartbeat_s = message.heartbeat_s
                if message.incarnation != self._incarnation:
                    if self._incarnation:
                        self._hello()
                        self.lease.say_again()
                    self._incarnation = message.incarnation
            case Stop():
                self.stop(message.reason, message.deadline_s)
            case LeaseGranted():
                self.lease.granted(message.lease_epoch, message.shared)
            case LeaseRevoked():
                self.lease.revoked(message.lease_epoch, message.offload)
            case _ if self.actor is None:
                self._early.append((sender, message, payload))
            case Introduce():
                self.actor.introduced(message)
                for waiting, with_payload in self._unmet.pop(message.peer, ()):
                    self.actor.on_message(message.peer, waiting, with_payload)
            case Forget():
                self._unmet.pop(message.peer, None)
                self.actor.forgotten(message.peer, message.epoch)
            case AskCall() if sender in self.actor.peers:
                self.endpoint.send(sender, self.actor.in_call())
            case _ if sender == FLOWD or sender in self.actor.peers:
                self.actor.on_message(sender, message, payload)
            case _:
                # The other side was introduced first: it is answered once it is known here too.
                self._wait_for_introduction(sender, message, payload)

    def _wait_for_introduction(self, sender: str, message: Message, payload: Any) -> None:
        """Keep a message of an actor that is not known yet; strangers may not fill the memory."""
        self._unmet.setdefault(sender, []).append((message, payload))
        while sum(map(len, self._unmet.values())) > MAX_UNMET:
            # flowd introduces both sides in one breath: who has waited longest will not be met any more.
            longest = next(iter(self._unmet))
            dropped = self._unmet.pop(longest)
            log.warning("unmet_dropped sender=%s messages=%d", longest, len(dropped))
