"""One job: its actors from the first spawn to the last exit. Introduces, restarts within a budget, scales, ends.

The same class serves the daemon (actors are processes) and inline mode (actors are tasks); a `Spawner` makes the
difference. What is decided elsewhere: which replica gets which devices (`planner`), who may compute (`leases`), what is
issued and when the job is over (the conductor). Messages of the job's actors come in through `receive`.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from actors.job_config import JobConfig
from actors.registry import PEERS
from channels.endpoint import Endpoint
from channels.errors import ChannelError
from channels.lifecycle import (
    ActorSpec,
    Failed,
    FirstOutput,
    Forget,
    HandedOver,
    HandOver,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Introduce,
    JobEvent,
    JobFinished,
    LeaseBusy,
    LeaseIdle,
    LeaseReleased,
    LeaseWanted,
    Ready,
    Stop,
    Welcome,
    heartbeat_interval_s,
)
from channels.messages import Message
from flowd.budget import RestartBudget
from flowd.devices import Device
from flowd.errors import FlowdError, RequestError
from flowd.leasing import LeaseShell
from flowd.planner import Plan, Replica, plan_scale

log = logging.getLogger(__name__)

HUNG_AFTER_S = 30.0  # an actor's loop that did not beat for so long is stuck
STOP_DEADLINE_S = 5.0
KILL_DEADLINE_S = 5.0
EXIT_RAISED = 1  # of an actor that raised, as in actors/host.py
LAST_WORDS_S = 1.0
MAX_RESTARTS = 3
RESTART_WINDOW_S = 60.0
HAND_OVER_S = 600.0
FIRST_OUTPUT_S = 120.0


class Process(Protocol):
    """A running actor, whatever it runs in. `exited` resolves to something that prints how it ended."""

    pid: int
    exited: "asyncio.Future[Any]"

    def kill(self) -> None: ...


class Spawner(Protocol):
    """Starts actors."""

    async def __call__(self, spec: ActorSpec, python: str | None) -> Process: ...


@dataclass
class ActorRecord:
    """What is known of one actor (one rank of a replica)."""

    name: str
    kind: str
    replica: str
    rank: int
    num_ranks: int
    devices: tuple[str, ...]
    epoch: int = 0
    state: str = "starting"  # starting, ready, stopping, gone
    process: Process | None = None
    address: str = ""
    restarts: int = 0
    heard: float = field(default_factory=time.monotonic)
    report: dict[str, Any] = field(default_factory=dict)
    welcomed: bool = False
    failure: Failed | None = None
    failed_event: asyncio.Event = field(default_factory=asyncio.Event)
    ready_event: asyncio.Event = field(default_factory=asyncio.Event)
    output_event: asyncio.Event = field(default_factory=asyncio.Event)
    watcher: "asyncio.Task[None] | None" = None

    def status(self, node: str) -> dict[str, Any]:
        """For `flowctl status`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "pid": self.process.pid if self.process is not None else None,
            "node": node,
            "devices": list(self.devices),
            "state": self.state,
            "restarts": self.restarts,
            "waits_for": self.report.get("waits_for", ""),
            "time": self.report.get("time", {}),
        }


@dataclass(frozen=True, kw_only=True)
class JobPlaces:
    """Where a job's things lie."""

    run_dir: Path
    socket_dir: Path
    weights_dir: Path
    cache_dir: Path


class Job:
    """See the module docstring.

    emit(kind, data): tell users and the event log    on_end(job): called once, after the last actor is gone
    """

    def __init__(
        self,
        name: str,
        config: JobConfig,
        plan: Plan,
        devices: Iterable[Device],
        *,
        endpoint: Endpoint,
        leases: LeaseShell,
        spawn: Spawner,
        places: JobPlaces,
        node: str,
        incarnation: str,
        emit: Callable[[str, dict[str, Any]], None],
        on_end: Callable[["Job"], None],
        on_change: Callable[["Job"], None] = lambda job: None,
        orphan_grace_s: float = 30.0,
    ) -> None:
        self.name = name
        self.config = config
        self.plan = plan
        self.devices = {device.id: device for device in devices}
        self.endpoint = endpoint
        self.leases = leases
        self.places = places
        self.node = node
        self.incarnation = incarnation
        self.state = "starting"
        self.reason = ""
        self.error: str | None = None
        self.metrics: dict[str, Any] = {}
        self.actors: dict[str, ActorRecord] = {}
        self.ended = asyncio.Event()
        self._spawn = spawn
        self._emit = emit
        self._on_end = on_end
        self._on_change = on_change
        self._orphan_grace_s = orphan_grace_s
        self._budgets: dict[str, RestartBudget] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: asyncio.Task[None] | None = None
        self._scaling = asyncio.Lock()
        self._handed_over: asyncio.Future[None] | None = None
        self._finished: asyncio.Event = asyncio.Event()
        self._packed_config = msgspec.msgpack.encode(config)
        self._replacing = asyncio.Lock()

    # Life.

    async def start(self) -> None:
        """Spawn everything. Returns once all processes are started, not yet ready."""
        for directory in (
            self.places.run_dir / "logs",
            self.places.run_dir / "checkpoints",
            self.places.weights_dir,
            self.places.cache_dir,
        ):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self.places.run_dir.glob(".rendezvous-*"):
            left.unlink()  # a resumed job counts epochs anew: its ranks would meet those of before
        for replica in self.plan.replicas:
            if replica.devices:
                self._lease(replica)
        conductor = ActorRecord("conductor", "conductor", "conductor", 0, 1, ())
        records = [conductor, *(r for replica in self.plan.replicas for r in _records(replica))]
        for record in records:
            self.actors[record.name] = record
        async with self._replacing:
            await self._spawn_all(records)
        self._refuse_when_ending("started")
        self._set_state("running")

    async def end(self, state: str, reason: str, error: str | None = None) -> None:
        """Stop every actor and settle the job; later calls wait for the first."""
        if self._ending is None:
            self.state_after = state
            self.reason, self.error = reason, error
            self._ending = asyncio.create_task(self._end(state), name=f"end-{self.name}")
        await asyncio.shield(self._ending)

    async def _end(self, state: str) -> None:
        # What is being replaced now would come up after everything was stopped.
        replacing = [t for t in self._tasks if t.get_name().startswith("replace-")]
        for task in replacing:
            task.cancel()
        await asyncio.gather(*replacing, return_exceptions=True)
        await self._stop([r for r in self.actors.values() if r.state != "gone"], self.reason)
        for record in self.actors.values():
            if record.process is None:
                record.state = "gone"  # its start was cancelled
        current = asyncio.current_task()
        for task in [t for t in self._tasks if t is not current]:
            task.cancel()
        for replica in self.plan.replicas:
            if replica.devices:
                self.leases.remove(self._lease_name(replica.id))
        self._set_state(state)
        self.ended.set()
        self._on_end(self)

    def detach(self) -> None:
        """Stop watching, leave the actors alone: flowd goes and another one will come."""
        for task in self._tasks:
            task.cancel()

    def _set_state(self, state: str) -> None:
        if self.state == state or self.ended.is_set():
            return
        self.state = state
        self._emit("job", {"state": state, "reason": self.reason, "error": self.error})
        self._on_change(self)

    def _task(self, work: Awaitable[Any], name: str) -> "asyncio.Task[Any]":
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error(
                "job=%s task=%s failed", self.name, task.get_name(), exc_info=task.exception()
            )

    # Actors.

    def _lease_name(self, replica: str) -> str:
        return f"{self.name}/{replica}"

    def _lease(self, replica: Replica, *, known: bool = False) -> None:
        self.leases.add(
            self._lease_name(replica.id),
            replica.devices,
            ranks=_ReplicaRanks(self, replica.id),
            num_ranks=len(replica.devices) if replica.stage == "trainer" else 1,
            spans=self.places.run_dir / "spans.jsonl",
            known=known,
        )

    async def _spawn_all(self, records: list[ActorRecord]) -> None:
        async with asyncio.TaskGroup() as group:
            for record in records:
                group.create_task(self._spawn_one(record))

    async def _spawn_one(self, record: ActorRecord) -> None:
        record.state = "starting"
        record.failure = None
        record.failed_event.clear()
        record.heard = time.monotonic()
        record.welcomed = False
        python = getattr(getattr(self.config, record.kind, None), "python", None)
        process = await self._spawn(self._spec(record), python)
        record.process = process
        _remove_socket_of(process, self._address(record))
        if self._ending is not None:
            process.kill()  # whoever ended the job meanwhile did not see it
            record.state = "gone"
            return
        record.heard = time.monotonic()  # the fork server may still have been importing
        record.watcher = self._task(self._watch(record, process), f"watch-{record.name}")
        self._actor_changed(record)

    def _refuse_when_ending(self, what: str) -> None:
        if self._ending is not None:
            raise FlowdError(f'job "{self.name}" ended while it was being {what}: {self.reason}')

    def _spec(self, record: ActorRecord) -> ActorSpec:
        device = self.devices[record.devices[0]] if record.devices else None
        return ActorSpec(
            actor=record.name,
            job=self.name,
            kind=record.kind,
            epoch=record.epoch,
            replica=record.replica,
            rank=record.rank,
            num_ranks=record.num_ranks,
            devices=record.devices,
            replica_devices=tuple(
                device
                for other in self.actors.values()
                if other.replica == record.replica
                for device in other.devices
            ),
            device_memory_bytes=device.memory_bytes if device is not None else None,
            config=self._packed_config,
            run_dir=str(self.places.run_dir),
            address=self._address(record),
            weights_dir=str(self.places.weights_dir),
            cache_dir=str(self.places.cache_dir),
            flowd_address=self.endpoint.address,
            orphan_grace_s=self._orphan_grace_s,
            threads=4 if device is not None and device.kind == "cuda" else 1,
        )

    def _address(self, record: ActorRecord) -> str:
        # Short: a Unix socket's path holds 107 bytes. The tag keeps two jobs' actors apart.
        tag = hashlib.sha256(self.name.encode()).hexdigest()[:4]
        return f"ipc://{self.places.socket_dir}/{tag}{record.name}.{record.epoch}"

    def adopt(self, record: ActorRecord, process: Process) -> None:
        """An actor of an earlier flowd that still runs: it will say hello."""
        record.process = process
        record.state = "starting"
        self.actors[record.name] = record
        _remove_socket_of(process, self._address(record))
        record.watcher = self._task(self._watch(record, process), f"watch-{record.name}")
        self._welcome(record)

    def lost_while_away(self, record: ActorRecord) -> None:
        """An actor of an earlier flowd that died while no flowd watched."""
        self.actors[record.name] = record
        _remove_socket(self._address(record))
        self._task(self._gone(record, "gone while no flowd was there"), f"gone-{record.name}")

    def settle(self) -> None:
        """After adoption: hook replicas up to their leases, and go on with a scale that the earlier flowd had begun.

        The plan is saved before any of it is done: what runs beyond the plan leaves, what is missing starts.
        """
        if self.state == "starting":
            self._set_state("running")
        planned = {replica.id for replica in self.plan.replicas}
        there = {record.replica for record in self.actors.values()}
        leaving = [
            r for r in self.actors.values() if r.kind != "conductor" and r.replica not in planned
        ]
        missing = [replica for replica in self.plan.replicas if replica.id not in there]
        for replica in self.plan.replicas:
            if replica.devices and replica.id in there:
                known = self.leases.table.lease(self._lease_name(replica.id)) is not None
                self._lease(replica, known=known)
        for lease in list(self.leases.table):
            name, _, left = lease.replica.partition("/")
            if name != self.name or left in planned:
                continue
            if left in there:
                stage = next(r.kind for r in leaving if r.replica == left)
                self._lease(
                    Replica(id=left, stage=stage, index=0, devices=lease.devices), known=True
                )
            else:
                self.leases.remove(lease.replica)
        if leaving or missing:
            self._task(self._settle(leaving, missing), "settle")

    async def _settle(self, leaving: list[ActorRecord], missing: list[Replica]) -> None:
        async with self._scaling:
            await self._all_events([self.actors["conductor"].ready_event], FIRST_OUTPUT_S)
            started, _ = await self._exchange(leaving, missing, "a scale that was begun goes on")
        self._emit(
            "scale",
            {"started": [r.name for r in started], "stopped": [r.name for r in leaving]},
        )

    def _welcome(self, record: ActorRecord) -> None:
        if record.address:
            self.endpoint.connect(self._peer(record), record.address)
            record.welcomed = True
            self._send(
                record,
                Welcome(
                    incarnation=self.incarnation,
                    heartbeat_s=heartbeat_interval_s(self._orphan_grace_s),
                ),
            )

    def _peer(self, record: ActorRecord) -> str:
        return f"{self.name}/{record.name}"

    def _send(self, record: ActorRecord, message: Message) -> None:
        try:
            self.endpoint.send(self._peer(record), message)
        except ChannelError as error:
            log.debug("actor=%s was not told: %s", record.name, error)

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
        expected = record.state == "stopping" or self._ending is not None or self._finished.is_set()
        was_known = record.state in ("ready", "stopping")
        record.state = "gone"
        self.endpoint.disconnect(self._peer(record))
        for other in self.actors.values():
            if was_known and other.state == "ready" and _meet(record, other):
                self._send(
                    other,
                    Forget(
                        peer=self._peer(record), kind=record.kind, epoch=record.epoch, reason=how
                    ),
                )
        self._actor_changed(record)
        if expected:
            return
        log.warning("job=%s actor=%s lost how=%s", self.name, record.name, how)
        self._task(self._replace(record, record.process, how), f"replace-{record.name}")

    async def _replace(self, record: ActorRecord, dead: Process | None, how: str) -> None:
        """One at a time: the loss of a conductor, or of one rank, replaces others as well."""
        async with self._replacing:
            if record.process is not dead or self._ending is not None:
                return  # replaced together with another one that was lost
            if self.actors.get(record.name) is not record:
                return  # it was to leave anyway
            try:
                await self._replace_now(record, how)
            except* FlowdError as errors:
                reason = f"{record.name} ({how}) could not be started again: {errors.exceptions[0]}"
                self._task(self.end("failed", reason), "end")

    async def _replace_now(self, record: ActorRecord, how: str) -> None:
        failure = record.failure
        budget = self._budgets.setdefault(
            record.replica, RestartBudget(MAX_RESTARTS, RESTART_WINDOW_S)
        )
        if (failure is not None and failure.during_setup) or not budget.allows(time.monotonic()):
            why = f"{record.name} {'raised ' + failure.error if failure else how}"
            if failure is None or not failure.during_setup:
                why += f", and was restarted {record.restarts} times already"
            error = failure.traceback if failure is not None else self._log_tail(record)
            self._task(self.end("failed", why, error), "end")
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
        if record.kind == "conductor":
            victims = [r for r in self.actors.values() if r.state != "gone"]
            again = list(self.actors.values())
        else:
            again = [r for r in self.actors.values() if r.replica == record.replica]
            victims = [r for r in again if r.state != "gone"]
        await self._kill(victims)
        if record.kind == "conductor" and self._handed_over is not None:
            # The trainer was killed as well: there is nothing left to hand over.
            if not self._handed_over.done():
                self._handed_over.set_result(None)
        replaced = {r.replica for r in again}
        for replica in self.plan.replicas:
            if replica.devices and replica.id in replaced:
                self.leases.remove(self._lease_name(replica.id))
        for replica in self.plan.replicas:
            if replica.devices and replica.id in replaced:
                self._lease(replica)
        for other in again:
            other.epoch += 1
            other.restarts += 1
            other.address = ""
            other.ready_event.clear()
        for other in again:
            other.process = None
        await self._spawn_all(again)

    async def _kill(self, records: list[ActorRecord]) -> None:
        for record in records:
            record.state = "stopping"
            if record.process is not None:
                record.process.kill()
        await self._wait_exits(records, KILL_DEADLINE_S)

    async def _stop(self, records: list[ActorRecord], reason: str) -> None:
        """Ask to leave, wait, then kill."""
        for record in records:
            record.state = "stopping"
            if record.address:
                self._send(record, Stop(reason=reason, deadline_s=STOP_DEADLINE_S))
            elif record.process is not None:
                record.process.kill()
        left = await self._wait_exits(records, STOP_DEADLINE_S + 1.0)
        if left:
            log.warning("job=%s killing=%s", self.name, [r.name for r in left])
            await self._kill(left)

    async def _wait_exits(self, records: list[ActorRecord], deadline_s: float) -> list[ActorRecord]:
        exits = [r.process.exited for r in records if r.process is not None]
        if exits:
            await asyncio.wait(exits, timeout=deadline_s)
        left = [r for r in records if r.process is not None and not r.process.exited.done()]
        for record in records:
            if record not in left and record.watcher is not None:
                await asyncio.wait([record.watcher], timeout=1.0)
        return left

    def check_heartbeats(self, now: float) -> None:
        """Kill actors whose loop has not beaten for too long; their watchers do the rest."""
        for record in self.actors.values():
            if record.state in ("starting", "ready") and now - record.heard > HUNG_AFTER_S:
                log.error(
                    "job=%s actor=%s hung: no heartbeat for %.0f s; killing it",
                    self.name,
                    record.name,
                    now - record.heard,
                )
                record.heard = now
                if record.process is not None:
                    record.process.kill()

    def _log_tail(self, record: ActorRecord) -> str:
        path = self.places.run_dir / "logs" / f"{record.name}.log"
        try:
            lines = path.read_text(errors="replace").splitlines()[-30:]
        except OSError:
            return ""
        return "\n".join(lines)

    # Messages.

    def receive(self, actor: str, message: Message) -> None:
        """A message of one of the job's actors."""
        record = self.actors.get(actor)
        if record is None or record.state == "gone":
            return
        epoch = getattr(message, "epoch", record.epoch)
        if epoch != record.epoch:
            return  # from an earlier life of this actor
        record.heard = time.monotonic()
        lease = self._lease_name(record.replica)
        match message:
            case Heartbeat():
                record.report = message.report
                if record.welcomed:
                    self._send(record, HeartbeatReply(incarnation=self.incarnation))
                else:
                    self._welcome(record)
            case Hello():
                self._hello(record, message)
            case Ready():
                self._ready(record)
            case FirstOutput():
                record.output_event.set()
            case Failed():
                record.failure = message
                record.failed_event.set()
                self._emit(
                    "failed",
                    {
                        "actor": record.name,
                        "error": message.error,
                        "traceback": message.traceback,
                    },
                )
            case LeaseWanted():
                # The replica was granted before this rank had said hello.
                if (grant := self.leases.want(lease)) is not None:
                    self._send(record, grant)
            case LeaseIdle() if record.rank == 0:
                self.leases.idle(lease, message.lease_epoch)
            case LeaseBusy() if record.rank == 0:
                self.leases.busy(lease, message.lease_epoch)
            case LeaseReleased():
                self.leases.released(lease, record.rank, message.lease_epoch, message.memory_bytes)
            case JobEvent():
                if message.kind == "step":
                    self.metrics = message.data
                self._emit(message.kind, message.data)
            case HandedOver():
                if self._handed_over is not None and not self._handed_over.done():
                    self._handed_over.set_result(None)
            case JobFinished():
                self._finished.set()
                self._task(self.end(message.state, message.reason), "end")

    def _hello(self, record: ActorRecord, hello: Hello) -> None:
        record.address = hello.address
        self._welcome(record)
        if hello.ready and record.state == "starting":
            self._ready(record)

    def _ready(self, record: ActorRecord) -> None:
        if record.state != "starting":
            return
        record.state = "ready"
        record.ready_event.set()
        for other in self.actors.values():
            if other is not record and other.state == "ready" and _meet(record, other):
                self._send(record, self._introduction(other))
                self._send(other, self._introduction(record))
        self._actor_changed(record)

    def _introduction(self, record: ActorRecord) -> Introduce:
        return Introduce(
            peer=self._peer(record),
            kind=record.kind,
            address=record.address,
            epoch=record.epoch,
            rank=record.rank,
        )

    def _actor_changed(self, record: ActorRecord) -> None:
        self._emit("actor", record.status(self.node))
        self._on_change(self)

    # Scaling.

    async def scale(
        self, stage: str, change: str, idle: list[Device], from_stage: str | None
    ) -> dict[str, Any]:
        """Carry out a change of the plan; returns the seconds it took, by part."""
        if self._scaling.locked():
            raise RequestError(
                f'job "{self.name}" is being scaled already: wait until that is done'
            )
        async with self._scaling:
            return await self._scale(stage, change, idle, from_stage)

    async def _scale(
        self, stage: str, change: str, idle: list[Device], from_stage: str | None
    ) -> dict[str, Any]:
        began = time.monotonic()
        decision = plan_scale(self.plan, stage, change, idle, from_stage=from_stage)
        for device in idle:
            self.devices[device.id] = device
        leaving = [r for r in self.actors.values() if r.replica in decision.stop]
        self.plan = decision.plan
        started, drained = await self._exchange(leaving, decision.start, f"scale {stage}={change}")
        await self._all_events([r.ready_event for r in started], FIRST_OUTPUT_S)
        ready = time.monotonic()
        delivered = await self._all_events([r.output_event for r in started], FIRST_OUTPUT_S)
        done = time.monotonic()
        self._refuse_when_ending("scaled")
        self._on_change(self)
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

    async def _exchange(
        self, leaving: list[ActorRecord], start: Iterable[Replica], why: str
    ) -> tuple[list[ActorRecord], float]:
        """Stop some, start others. Returns those started, and when the others were gone (monotonic)."""
        # What needs no device of those that leave starts while they drain.
        held = {device for record in leaving for device in record.devices}
        early = [r for r in start if not held & set(r.devices) and r.stage != "trainer"]
        started = await self._start_replicas(early)
        if any(record.kind == "trainer" for record in leaving):
            await self._hand_over(next(r.replica for r in leaving if r.kind == "trainer"))
        async with self._replacing:  # one that is being restarted can be stopped once it is there
            await self._stop([r for r in leaving if r.state != "gone"], why)
            for replica in {record.replica for record in leaving if record.devices}:
                self.leases.remove(self._lease_name(replica))
            for record in leaving:
                self.actors.pop(record.name, None)
        drained = time.monotonic()
        started += await self._start_replicas([r for r in start if r not in early])
        return started, drained

    async def _start_replicas(self, replicas: list[Replica]) -> list[ActorRecord]:
        records = []
        async with self._replacing:
            self._refuse_when_ending("scaled")
            for replica in replicas:
                if replica.devices:
                    self._lease(replica)
                for record in _records(replica):
                    self.actors[record.name] = record
                    records.append(record)
            await self._spawn_all(records)
            if self._ending is not None:
                for replica in replicas:
                    if replica.devices:
                        self.leases.remove(self._lease_name(replica.id))
            self._refuse_when_ending("scaled")
        return records

    async def _hand_over(self, replica: str) -> None:
        """Have the trainer commit at a step boundary."""
        if self.actors["conductor"].state != "ready":
            return  # without one nothing is trained: the last commit is where it stands
        self._handed_over = asyncio.get_running_loop().create_future()
        self._send(self.actors["conductor"], HandOver(replica=replica))
        ended: asyncio.Future[Any] = asyncio.create_task(self.ended.wait())
        over: asyncio.Future[Any] = self._handed_over
        try:
            await asyncio.wait(
                {over, ended},
                timeout=HAND_OVER_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            ended.cancel()

    async def _all_events(self, events: list[asyncio.Event], deadline_s: float) -> bool:
        """Wait for all events, no longer than the job lives. Returns whether all came."""

        async def everything() -> None:
            for event in events:
                await event.wait()

        waiting = asyncio.create_task(everything())
        ended = asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait(
                {waiting, ended}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
            return waiting.done()
        finally:
            for task in (waiting, ended):
                task.cancel()

    # What users see.

    def summary(self) -> dict[str, Any]:
        """For `flowctl jobs`."""
        return {
            "name": self.name,
            "state": self.state,
            "step": self.metrics.get("policy_version", 0),
            "steps": self.config.job.steps,
            "policy_version": self.metrics.get("policy_version", 0),
            "reward_mean": self.metrics.get("reward_mean"),
            "staleness_max": self.metrics.get("staleness_max"),
            "tokens_per_s": self.metrics.get("tokens_per_s"),
            "attempt": self.metrics.get("attempt", 0),
            "reason": self.reason,
            "error": self.error or (self.reason if self.state == "failed" else None),
        }

    def status(self) -> dict[str, Any]:
        """For `flowctl status`."""
        return {
            **self.summary(),
            "actors": [record.status(self.node) for record in self.actors.values()],
        }


class _ReplicaRanks:
    """How the lease shell reaches the processes of a replica."""

    def __init__(self, job: Job, replica: str) -> None:
        self._job = job
        self._replica = replica

    def _records(self) -> list[ActorRecord]:
        return [r for r in self._job.actors.values() if r.replica == self._replica]

    def tell(self, message: Message) -> None:
        for record in self._records():
            self._job._send(record, message)

    def kill(self, reason: str) -> None:
        for record in self._records():
            if record.process is not None:
                record.process.kill()


def _remove_socket(address: str) -> None:
    """An actor that was killed leaves its socket; it may not even have said hello."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address.removeprefix("ipc://"))


def _remove_socket_of(process: Process, address: str) -> None:
    """Remove it when the process is gone; not when flowd only lets go of it (cancelled)."""
    process.exited.add_done_callback(
        lambda ended: None if ended.cancelled() else _remove_socket(address)
    )


def _records(replica: Replica) -> list[ActorRecord]:
    """The ranks of a replica: a trainer has one per device, the others one."""
    ranks = max(1, len(replica.devices)) if replica.stage == "trainer" else 1
    return [
        ActorRecord(
            name=replica.id if rank == 0 else f"{replica.id}.{rank}",
            kind=replica.stage,
            replica=replica.id,
            rank=rank,
            num_ranks=ranks,
            devices=replica.devices[rank : rank + 1] if ranks > 1 else replica.devices,
        )
        for rank in range(ranks)
    ]


def _meet(one: ActorRecord, other: ActorRecord) -> bool:
    """Whether two actors are introduced: kinds that talk, and ranks of one replica."""
    if one.kind == "trainer" and other.kind == "trainer":
        return one.replica == other.replica
    return other.kind in PEERS[one.kind]
