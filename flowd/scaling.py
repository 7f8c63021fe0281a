"""Changes of a running job's plan: which replicas leave, which start, in which order. `planner` decides what.

A trainer commits before it leaves, so that its successor goes on from there. A change that cannot be carried out is
taken back: the job goes on with the replicas that it had.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from channels.lifecycle import HandOver
from flowd.actor_record import ActorRecord
from flowd.devices import Device
from flowd.errors import FlowdError, RequestError
from flowd.introductions import Introductions
from flowd.planner import Plan, Replica, plan_scale
from flowd.roster import Roster
from flowd.supervisor import Supervisor

HAND_OVER_S = 600.0
FIRST_OUTPUT_S = 120.0


class Scaling:
    """One per job. ended: the job's; save: called when the plan is carried out; fail: the job cannot go on."""

    def __init__(
        self,
        roster: Roster,
        supervisor: Supervisor,
        introductions: Introductions,
        *,
        emit: Callable[[str, dict[str, Any]], None],
        save: Callable[[], None],
        fail: Callable[[str, str | None], None],
        ended: asyncio.Event,
    ) -> None:
        self._roster = roster
        self._supervisor = supervisor
        self._introductions = introductions
        self._emit = emit
        self._save = save
        self._fail = fail
        self._ended = ended
        self._busy = asyncio.Lock()
        self._handed_over: asyncio.Future[None] | None = None

    async def scale(
        self, stage: str, change: str, idle: list[Device], from_stage: str | None
    ) -> dict[str, Any]:
        """Carry out a change of the plan; returns the seconds it took, by part."""
        if self._busy.locked():
            raise RequestError(
                f'job "{self._roster.job}" is being scaled already: wait until that is done'
            )
        async with self._busy:
            return await self._scale(stage, change, idle, from_stage)

    async def _scale(
        self, stage: str, change: str, idle: list[Device], from_stage: str | None
    ) -> dict[str, Any]:
        began = time.monotonic()
        roster = self._roster
        decision = plan_scale(roster.plan, stage, change, idle, from_stage=from_stage)
        for device in idle:
            roster.devices[device.id] = device
        leaving = [r for r in roster.actors.values() if r.replica in decision.stop]
        before, roster.plan = roster.plan, decision.plan
        started, drained = await self._exchange(
            leaving, decision.start, f"scale {stage}={change}", before
        )
        await self._all_events([r.ready_event for r in started])
        ready = time.monotonic()
        delivered = await self._all_events([r.output_event for r in started])
        done = time.monotonic()
        roster.refuse_when_ending("scaled")
        self._save()
        result = {
            "seconds_total": round(done - began, 4),
            "seconds_drain": round(drained - began, 4) if leaving else 0.0,
            "seconds_ready": round(ready - began, 4),
            "seconds_first_output": round(done - began, 4) if started and delivered else None,
            "started": [r.name for r in started],
            "stopped": [r.name for r in leaving],
        }
        self._emit("scale", {"stage": stage, "change": change, **result})
        return result

    async def go_on(self, leaving: list[ActorRecord], missing: list[Replica], before: Plan) -> None:
        """Carry out what an earlier flowd had begun: it saved the plan before it did any of it."""
        async with self._busy:
            await self._all_events([self._roster.actors["conductor"].ready_event])
            try:
                why = "a scale that was begun goes on"
                started, _ = await self._exchange(leaving, missing, why, before)
            except FlowdError as error:
                self._emit("scale", {"error": str(error)})  # nobody waits for it any more
                return
        self._emit(
            "scale",
            {"started": [r.name for r in started], "stopped": [r.name for r in leaving]},
        )

    def handed_over(self) -> None:
        """The trainer has committed, or was killed: there is nothing left to hand over."""
        if self._handed_over is not None and not self._handed_over.done():
            self._handed_over.set_result(None)

    async def _exchange(
        self, leaving: list[ActorRecord], start: Iterable[Replica], why: str, before: Plan
    ) -> tuple[list[ActorRecord], float]:
        """Stop some, start others. Returns those started, and when the others were gone (monotonic).

        before: the plan to return to when one cannot be started, which raises FlowdError
        """
        # What needs no device of those that leave starts while they drain.
        held = {device for record in leaving for device in record.devices}
        early = [r for r in start if not held & set(r.devices) and r.stage != "trainer"]
        started: list[ActorRecord] = []
        gone: list[ActorRecord] = []
        try:
            started += await self._supervisor.add(early)
            if any(record.kind == "trainer" for record in leaving):
                await self._hand_over(next(r.replica for r in leaving if r.kind == "trainer"))
            await self._supervisor.remove(leaving, why)
            gone, drained = leaving, time.monotonic()
            started += await self._supervisor.add([r for r in start if r not in early])
        except FlowdError as error:
            if self._roster.ending is not None:
                raise
            await self._take_back(started, gone, before, error)
            raise FlowdError(
                f'{why}: {error}; job "{self._roster.job}" goes on as before'
            ) from error
        return started, drained

    async def _take_back(
        self, started: list[ActorRecord], gone: list[ActorRecord], before: Plan, error: FlowdError
    ) -> None:
        """Return to the plan before a change that could not be carried out."""
        roster = self._roster
        # Ids are not used again, not even those of replicas that never came up.
        roster.plan = replace(before, next_index=roster.plan.next_index)
        await self._supervisor.remove(started, "its scale failed")
        try:
            await self._supervisor.bring_back(gone)
        except FlowdError as again:
            names = ", ".join(record.name for record in gone)
            self._fail(f"{names} made way for a scale that failed and cannot return: {again}", None)
            raise FlowdError(
                f'{error}; job "{roster.job}" fails, as {names} cannot return'
            ) from again
        self._save()

    async def _hand_over(self, replica: str) -> None:
        """Have the trainer commit at a step boundary."""
        conductor = self._roster.actors["conductor"]
        if conductor.state != "ready":
            return  # without one nothing is trained: the last commit is where it stands
        self._handed_over = asyncio.get_running_loop().create_future()
        self._introductions.send(conductor, HandOver(replica=replica))
        await self._unless_ended(self._handed_over, HAND_OVER_S)

    async def _all_events(self, events: list[asyncio.Event]) -> bool:
        """Wait for all events, no longer than the job lives. Returns whether all came."""

        async def everything() -> None:
            for event in events:
                await event.wait()

        waiting = asyncio.create_task(everything())
        try:
            return await self._unless_ended(waiting, FIRST_OUTPUT_S)
        finally:
            waiting.cancel()

    async def _unless_ended(self, what: "asyncio.Future[Any]", deadline_s: float) -> bool:
        """Wait for something, no longer than the job lives. Returns whether it came."""
        ended: asyncio.Future[Any] = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait(
                {what, ended}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
            return what.done()
        finally:
            ended.cancel()
