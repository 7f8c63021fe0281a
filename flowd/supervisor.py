"""The lives of a job's actors: started, watched, restarted within a budget, stopped. The replica is the unit.

What a job is, when it ends and how it is scaled is decided elsewhere; so is who computes (`leases`).
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from channels.lifecycle import ActorSpec, Stop
from channels.messages import Message
from flowd.actor_record import ActorRecord, Process, Spawner, records_of
from flowd.budget import RestartBudget
from flowd.errors import FlowdError
from flowd.introductions import Introductions
from flowd.leasing import LeaseShell
from flowd.planner import Replica
from flowd.roster import Roster
from flowd.tasks import Tasks

log = logging.getLogger(__name__)

HUNG_AFTER_S = 30.0  # an actor's loop that did not beat for so long is stuck
STOP_DEADLINE_S = 5.0
KILL_DEADLINE_S = 5.0
EXIT_RAISED = 1  # of an actor that raised, as in actors/host.py
LAST_WORDS_S = 1.0
LOG_TAIL_LINES = 30  # of a log without a traceback
TRACEBACK = "Traceback (most recent call last):"
LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d ", re.MULTILINE)
MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
MAX_WITHOUT_COMMIT = 5


class Supervisor:
    """One per job.

    fail(reason, error): the job cannot go on    changed(record): an actor's state is another one
    on_conductor_replaced: every actor was killed with it
    """

    def __init__(
        self,
        roster: Roster,
        introductions: Introductions,
        leases: LeaseShell,
        tasks: Tasks,
        *,
        spawn: Spawner,
        emit: Callable[[str, dict[str, Any]], None],
        changed: Callable[[ActorRecord], None],
        fail: Callable[[str, str | None], None],
        on_conductor_replaced: Callable[[], None],
        orphan_grace_s: float,
    ) -> None:
        self._roster = roster
        self._introductions = introductions
        self._leases = leases
        self._tasks = tasks
        self._spawn = spawn
        self._emit = emit
        self._changed = changed
        self._fail = fail
        self._on_conductor_replaced = on_conductor_replaced
        self._orphan_grace_s = orphan_grace_s
        self._budgets: dict[str, RestartBudget] = {}
        self._packed_config = msgspec.msgpack.encode(roster.config)
        self._replacing = asyncio.Lock()

    # Start.

    async def start(self) -> None:
        """Spawn the conductor and what the plan says. Returns once all processes run, not yet ready."""
        for replica in self._roster.plan.replicas:
            self.lease(replica)
        conductor = ActorRecord("conductor", "conductor", "conductor", 0, 1, ())
        replicas = self._roster.plan.replicas
        records = [conductor, *(r for replica in replicas for r in records_of(replica))]
        for record in records:
            self._roster.actors[record.name] = record
        async with self._replacing:
            await self._spawn_all(records)

    async def add(self, replicas: Iterable[Replica]) -> list[ActorRecord]:
        """Start replicas of a job that runs: all of them, or none and the FlowdError that says why."""
        records = []
        async with self._replacing:
            self._roster.refuse_when_ending("scaled")
            for replica in replicas:
                self.lease(replica)
                for record in records_of(replica):
                    self._roster.actors[record.name] = record
                    records.append(record)
            await self._spawn_or_drop(records)
        return records

    async def remove(self, leaving: list[ActorRecord], why: str) -> None:
        """Stop actors for good and give their leases back."""
        async with self._replacing:  # one that is being restarted can be stopped once it is there
            await self.stop([r for r in leaving if r.state != "gone"], why)
            self._drop(leaving)

    async def bring_back(self, removed: list[ActorRecord]) -> None:
        """Start actors again that were removed; their replicas are in the plan again."""
        async with self._replacing:
            self._roster.refuse_when_ending("scaled")
            back = {record.replica for record in removed}
            for replica in self._roster.plan.replicas:
                if replica.id in back:
                    self.lease(replica)
            for record in removed:
                self._roster.actors[record.name] = record
                _renew(record)
            await self._spawn_or_drop(removed)

    async def _spawn_or_drop(self, records: list[ActorRecord]) -> None:
        try:
            await self._spawn_all(records)
            self._roster.refuse_when_ending("scaled")
        except BaseException:
            await self._kill([r for r in records if r.state != "gone"])
            self._drop(records)
            raise

    def _drop(self, records: list[ActorRecord]) -> None:
        for replica in {record.replica for record in records if record.devices}:
            self._leases.remove(self._roster.lease_name(replica))
        for record in records:
            self._roster.actors.pop(record.name, None)

    def lease(self, replica: Replica, *, known: bool = False) -> None:
        """Enter a replica with devices into the lease table; known: it is there already."""
        if not replica.devices:
            return
        self._leases.add(
            self._roster.lease_name(replica.id),
            replica.devices,
            ranks=_ReplicaRanks(self._roster, self._introductions, replica.id),
            num_ranks=len(replica.devices) if replica.stage == "trainer" else 1,
            spans=self._roster.places.run_dir / "spans.jsonl",
            known=known,
        )

    def adopt(self, record: ActorRecord, process: Process) -> None:
        """An actor of an earlier flowd that still runs: it will say hello."""
        record.process = process
        record.state = "starting"
        self._roster.actors[record.name] = record
        _remove_socket_of(process, self._address(record))
        record.watcher = self._tasks.start(self._watch(record, process), f"watch-{record.name}")
        self._introductions.welcome(record)

    def lost_while_away(self, record: ActorRecord) -> None:
        """An actor of an earlier flowd that died while no flowd watched."""
        self._roster.actors[record.name] = record
        remove_socket(self._address(record))
        self._tasks.start(
            self._gone(record, "gone while no flowd was there"), f"gone-{record.name}"
        )

    async def _spawn_all(self, records: list[ActorRecord]) -> None:
        """Raises what the first that failed raised; the others may be there or not."""
        try:
            async with asyncio.TaskGroup() as group:
                for record in records:
                    group.create_task(self._spawn_one(record))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _spawn_one(self, record: ActorRecord) -> None:
        record.state = "starting"
        record.failure = None
        record.failed_event.clear()
        record.heard = time.monotonic()
        record.welcomed = False
        python = getattr(getattr(self._roster.config, record.kind, None), "python", None)
        process = await self._spawn(self._spec(record), python)
        record.process = process
        _remove_socket_of(process, self._address(record))
        if self._roster.ending is not None:
            process.kill()  # whoever ended the job meanwhile did not see it
            record.state = "gone"
            return
        record.heard = time.monotonic()  # the fork server may still have been importing
        record.watcher = self._tasks.start(self._watch(record, process), f"watch-{record.name}")
        self._changed(record)

    def _spec(self, record: ActorRecord) -> ActorSpec:
        roster = self._roster
        device = roster.devices[record.devices[0]] if record.devices else None
        return ActorSpec(
            actor=record.name,
            job=roster.job,
            kind=record.kind,
            epoch=record.epoch,
            replica=record.replica,
            rank=record.rank,
            num_ranks=record.num_ranks,
            devices=record.devices,
            replica_devices=tuple(
                device for rank in roster.ranks(record.replica) for device in rank.devices
            ),
            device_memory_bytes=device.memory_bytes if device is not None else None,
            config=self._packed_config,
            run_dir=str(roster.places.run_dir),
            address=self._address(record),
            weights_dir=str(roster.places.weights_dir),
            cache_dir=str(roster.places.cache_dir),
            flowd_address=self._introductions.flowd_address,
            orphan_grace_s=self._orphan_grace_s,
            threads=4 if device is not None and device.kind == "cuda" else 1,
            listen=roster.places.listen,
            security=roster.places.security,
        )

    def _address(self, record: ActorRecord) -> str:
        # Short: a Unix socket's path holds 107 bytes. The tag keeps two jobs' actors apart.
        tag = hashlib.sha256(self._roster.job.encode()).hexdigest()[:4]
        return f"ipc://{self._roster.places.socket_dir}/{tag}{record.name}.{record.epoch}"

    # Watch.

    def check_heartbeats(self, now: float) -> None:
        """Kill actors whose loop has not beaten for too long; their watchers do the rest."""
        for record in self._roster.actors.values():
            if record.state in ("starting", "ready") and now - record.heard > HUNG_AFTER_S:
                log.error(
                    "job=%s actor=%s hung: no heartbeat for %.0f s; killing it",
                    self._roster.job,
                    record.name,
                    now - record.heard,
                )
                record.heard = now
                if record.process is not None:
                    record.process.kill()

    async def _watch(self, record: ActorRecord, process: Process) -> None:
        status = await asyncio.shield(process.exited)
        if record.state != "stopping" and getattr(status, "exit_code", None) == EXIT_RAISED:
            # It said why before it left; the word of its end came another, quicker way.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await record.failed_event.wait()
        if record.process is process:
            await self._gone(record, str(status))

    async def _gone(self, record: ActorRecord, how: str) -> None:
        """A process ended: tell its peers; restart it unless it was to end."""
        roster = self._roster
        expected = record.state == "stopping" or roster.ending is not None or roster.finished
        was_known = record.state in ("ready", "stopping")
        record.state = "gone"
        self._introductions.disconnect(record)
        if was_known:
            self._introductions.forget(record, how)
        self._changed(record)
        if expected:
            return
        log.warning("job=%s actor=%s lost how=%s", roster.job, record.name, how)
        self._tasks.start(self._replace(record, record.process, how), f"replace-{record.name}")

    # Restart.

    async def stop_replacing(self) -> None:
        """The job ends: what is being replaced now would come up after everything was stopped."""
        replacing = self._tasks.named("replace-")
        for task in replacing:
            task.cancel()
        await asyncio.gather(*replacing, return_exceptions=True)

    async def _replace(self, record: ActorRecord, dead: Process | None, how: str) -> None:
        """One at a time: the loss of a conductor, or of one rank, replaces others as well."""
        async with self._replacing:
            if record.process is not dead or self._roster.ending is not None:
                return  # replaced together with another one that was lost
            if self._roster.actors.get(record.name) is not record:
                return  # it was to leave anyway
            try:
                await self._replace_now(record, how)
            except FlowdError as error:
                self._fail(f"{record.name} ({how}) could not be started again: {error}", None)

    async def _replace_now(self, record: ActorRecord, how: str) -> None:
        failure = record.failure
        refused = self._refusal(record, how)
        if refused is not None:
            error = failure.traceback if failure is not None else self._log_tail(record)
            if failure is None and error.startswith(TRACEBACK):
                refused += f"; its log ends with {error.splitlines()[-1]}"
            self._fail(refused, error)
            return
        self._emit(
            "restart",
            {
                "actor": record.name,
                "how": how,
                "error": failure.error if failure else "",
                "restarts": record.restarts + 1,
            },
        )
        whole = record.kind == "conductor"  # without it, nobody else knows what to do
        again = list(self._roster.actors.values()) if whole else self._roster.ranks(record.replica)
        await self._kill([r for r in again if r.state != "gone"])
        if whole:
            self._on_conductor_replaced()
        replaced = {r.replica for r in again}
        replicas = [r for r in self._roster.plan.replicas if r.id in replaced]
        for replica in replicas:
            if replica.devices:
                self._leases.remove(self._roster.lease_name(replica.id))
        for replica in replicas:
            self.lease(replica)
        for other in again:
            _renew(other)
        await self._spawn_all(again)

    def _refusal(self, record: ActorRecord, how: str) -> str | None:
        """Why an actor that ended is not started again; None when it is, which counts."""
        failure = record.failure
        end = f"{record.name} {'raised ' + failure.error if failure else how}"
        if failure is not None and failure.during_setup:
            return end  # and would again
        if record.replica not in self._budgets:
            self._budgets[record.replica] = RestartBudget(
                max_restarts=MAX_RESTARTS,
                window_s=RESTART_WINDOW_S,
                max_without_commit=MAX_WITHOUT_COMMIT,
            )
        budget = self._budgets[record.replica]
        spent = budget.ask(time.monotonic(), self._roster.committed_step)
        return None if spent is None else f"{end}; {spent}"

    def _log_tail(self, record: ActorRecord) -> str:
        path = self._roster.places.run_dir / "logs" / f"{record.name}.log"
        try:
            text = path.read_text(errors="replace").rstrip()
        except OSError:
            return ""
        _, traceback, last = text.rpartition(TRACEBACK)
        if traceback and not LOG_LINE.search(last):  # what the log ends with: whole, however long
            return traceback + last
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])

    # Stop.

    async def stop(self, records: list[ActorRecord], reason: str) -> None:
        """Ask to leave, wait, then kill."""
        for record in records:
            record.state = "stopping"
            if record.address:
                farewell = Stop(reason=reason, deadline_s=STOP_DEADLINE_S)
                self._introductions.send(record, farewell)
            elif record.process is not None:
                record.process.kill()
        left = await self._wait_exits(records, STOP_DEADLINE_S + 1.0)
        if left:
            log.warning("job=%s killing=%s", self._roster.job, [r.name for r in left])
            await self._kill(left)

    async def _kill(self, records: list[ActorRecord]) -> None:
        for record in records:
            record.state = "stopping"
            if record.process is not None:
                record.process.kill()
        await self._wait_exits(records, KILL_DEADLINE_S)

    async def _wait_exits(self, records: list[ActorRecord], deadline_s: float) -> list[ActorRecord]:
        exits = [r.process.exited for r in records if r.process is not None]
        if exits:
            await asyncio.wait(exits, timeout=deadline_s)
        left = [r for r in records if r.process is not None and not r.process.exited.done()]
        for record in records:
            if record not in left and record.watcher is not None:
                await asyncio.wait([record.watcher], timeout=1.0)
        return left


class _ReplicaRanks:
    """How the lease shell reaches the processes of a replica."""

    def __init__(self, roster: Roster, introductions: Introductions, replica: str) -> None:
        self._roster = roster
        self._introductions = introductions
        self._replica = replica

    def tell(self, message: Message) -> None:
        for record in self._roster.ranks(self._replica):
            self._introductions.send(record, message)

    def kill(self, reason: str) -> None:
        for record in self._roster.ranks(self._replica):
            if record.process is not None:
                record.process.kill()


def _renew(record: ActorRecord) -> None:
    """Another life begins."""
    record.epoch += 1
    record.restarts += 1
    record.address = record.remote_address = ""
    record.ready_event.clear()
    record.process = None


def remove_socket(address: str) -> None:
    """An actor that was killed leaves its socket; it may not even have said hello."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address.removeprefix("ipc://"))


def _remove_socket_of(process: Process, address: str) -> None:
    """Remove it when the process is gone; not when flowd only lets go of it (cancelled)."""
    process.exited.add_done_callback(
        lambda ended: None if ended.cancelled() else remove_socket(address)
    )
