"""One job, from its first actor's start to its last one's exit: its state, its messages, what users see of it.

The same class serves the daemon (actors are processes) and inline mode (actors are tasks); a `Spawner` makes the
difference. What is decided elsewhere: which replica gets which devices (`planner`), who may compute (`leases`), who is
restarted (`supervisor`), what is issued and when the job is over (the conductor).
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from actors.job_config import JobConfig
from channels.endpoint import Endpoint
from channels.lifecycle import (
    Failed,
    FirstOutput,
    HandedOver,
    Heartbeat,
    HeartbeatReply,
    Hello,
    JobEvent,
    JobFinished,
    LeaseBusy,
    LeaseIdle,
    LeaseReleased,
    LeaseWanted,
    Ready,
)
from channels.messages import Message
from flowd.actor_record import ActorRecord, Process, Spawner, replica_of
from flowd.devices import Device
from flowd.edges import edges
from flowd.introductions import Introductions
from flowd.leasing import LeaseShell
from flowd.paths import JobPlaces
from flowd.planner import Plan
from flowd.roster import Roster
from flowd.scaling import Scaling
from flowd.supervisor import Supervisor
from flowd.tasks import Tasks


class Job:
    """See the module docstring.

    emit(kind, data): tell users and the event log    on_end(job): called once, after the last actor is gone
    on_change(job): called when what another flowd must know of it is different
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
        self.state = "starting"
        self.outcome: str | None = None
        """What the job ends as, from the moment that this is decided."""
        self.reason = ""
        self.error: str | None = None
        self.metrics: dict[str, Any] = {}
        self.ended = asyncio.Event()
        self._leases = leases
        self._emit = emit
        self._on_end = on_end
        self._on_change = on_change
        self._incarnation = incarnation
        self._ending: asyncio.Task[None] | None = None
        self._tasks = Tasks(f"job={name}")
        self._roster = Roster(
            job=name,
            config=config,
            plan=plan,
            devices={device.id: device for device in devices},
            places=places,
            node=node,
        )
        self._introductions = Introductions(
            self._roster, endpoint, incarnation=incarnation, orphan_grace_s=orphan_grace_s
        )
        self._supervisor = Supervisor(
            self._roster,
            self._introductions,
            leases,
            self._tasks,
            spawn=spawn,
            emit=emit,
            changed=self._actor_changed,
            fail=self._fail,
            on_conductor_replaced=lambda: self._scaling.handed_over(),
            orphan_grace_s=orphan_grace_s,
        )
        self._scaling = Scaling(
            self._roster,
            self._supervisor,
            self._introductions,
            emit=emit,
            save=lambda: on_change(self),
            fail=self._fail,
            ended=self.ended,
        )

    @property
    def plan(self) -> Plan:
        """Which replicas there are to be, on which devices."""
        return self._roster.plan

    @property
    def actors(self) -> dict[str, ActorRecord]:
        """The actors by name, those that are gone included."""
        return self._roster.actors

    @property
    def places(self) -> JobPlaces:
        """Where the job's things lie."""
        return self._roster.places

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
        await self._supervisor.start()
        self._roster.refuse_when_ending("started")
        self._set_state("running")

    async def scale(
        self, stage: str, change: str, idle: list[Device], from_stage: str | None
    ) -> dict[str, Any]:
        """Carry out a change of the plan; returns the seconds it took, by part."""
        return await self._scaling.scale(stage, change, idle, from_stage)

    async def end(self, state: str, reason: str, error: str | None = None) -> None:
        """Stop every actor and settle the job; later calls wait for the first."""
        if self._ending is None:
            self._roster.ending = reason
            self.reason, self.error = reason, error
            self.outcome = state
            self._on_change(self)  # a flowd that is killed now is followed by one that ends it
            self._ending = asyncio.create_task(self._end(state), name=f"end-{self.name}")
        await asyncio.shield(self._ending)

    async def _end(self, state: str) -> None:
        await self._supervisor.stop_replacing()
        await self._supervisor.stop(self._roster.alive(), self.reason)
        for record in self.actors.values():
            if record.process is None:
                record.state = "gone"  # its start was cancelled
        self._tasks.cancel()
        for replica in self.plan.replicas:
            if replica.devices:
                self._leases.remove(self._roster.lease_name(replica.id))
        self._set_state(state)
        self.ended.set()
        self._on_end(self)

    def _fail(self, reason: str, error: str | None) -> None:
        self._tasks.start(self.end("failed", reason, error), "end")

    def _set_state(self, state: str) -> None:
        if self.state == state or self.ended.is_set():
            return
        self.state = state
        self._emit("job", {"state": state, "reason": self.reason, "error": self.error})
        self._on_change(self)

    def check_heartbeats(self, now: float) -> None:
        """Kill actors whose loop has not beaten for too long; they are restarted."""
        self._supervisor.check_heartbeats(now)

    # From one flowd to the next.

    def detach(self) -> None:
        """Stop watching, leave the actors alone: flowd goes and another one will come."""
        self._tasks.cancel()

    def adopt(self, record: ActorRecord, process: Process) -> None:
        """An actor of an earlier flowd that still runs: it will say hello."""
        self._supervisor.adopt(record, process)

    def lost_while_away(self, record: ActorRecord) -> None:
        """An actor of an earlier flowd that died while no flowd watched."""
        self._supervisor.lost_while_away(record)

    def settle(self) -> None:
        """After adoption: hook replicas up to their leases, and go on with a scale that the earlier flowd had begun.

        What runs beyond the plan leaves, what is missing starts.
        """
        if self.state == "starting":
            self._set_state("running")
        table = self._leases.table
        there = {record.replica for record in self.actors.values() if record.kind != "conductor"}
        planned = {replica.id: replica for replica in self.plan.replicas}
        beyond = [replica_of(self._roster.ranks(name)) for name in sorted(there - planned.keys())]
        before = [planned[name] for name in planned if name in there] + beyond
        for replica in before:
            known = table.lease(self._roster.lease_name(replica.id)) is not None
            self._supervisor.lease(replica, known=known)
        for lease in list(table):
            name, _, left = lease.replica.partition("/")
            if name == self.name and left not in there:
                self._leases.remove(lease.replica)
        missing = [replica for replica in self.plan.replicas if replica.id not in there]
        if beyond or missing:
            leaving = [rank for replica in beyond for rank in self._roster.ranks(replica.id)]
            going_on = self._scaling.go_on(
                leaving, missing, replace(self.plan, replicas=tuple(before))
            )
            self._tasks.start(going_on, "settle")

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
        lease = self._roster.lease_name(record.replica)
        match message:
            case Heartbeat():
                record.report = message.report
                if record.welcomed:
                    reply = HeartbeatReply(incarnation=self._incarnation)
                    self._introductions.send(record, reply)
                else:
                    self._introductions.welcome(record)
            case Hello():
                self._hello(record, message)
            case Ready():
                self._ready(record)
            case FirstOutput():
                record.output_event.set()
            case Failed():
                self._failed(record, message)
            case LeaseWanted():
                # The replica was granted before this rank had said hello.
                grant = self._leases.want(lease, record.rank, message.memory_bytes)
                if grant is not None:
                    self._introductions.send(record, grant)
            case LeaseIdle() if record.rank == 0:
                self._leases.idle(lease, message.lease_epoch)
            case LeaseBusy() if record.rank == 0:
                self._leases.busy(lease, message.lease_epoch)
            case LeaseReleased():
                self._leases.released(lease, record.rank, message.lease_epoch, message.memory_bytes)
            case JobEvent():
                if message.kind == "step":
                    self.metrics = message.data
                elif message.kind == "commit":
                    self._roster.committed_step = message.data["step"]
                self._emit(message.kind, message.data)
            case HandedOver():
                self._scaling.handed_over()
            case JobFinished():
                self._roster.finished = True
                self._tasks.start(self.end(message.state, message.reason), "end")

    def _hello(self, record: ActorRecord, hello: Hello) -> None:
        record.address = hello.address
        record.remote_address = hello.remote_address
        self._introductions.welcome(record)
        if hello.ready and record.state == "starting":
            self._ready(record)

    def _ready(self, record: ActorRecord) -> None:
        if record.state != "starting":
            return
        record.state = "ready"
        record.ready_event.set()
        self._introductions.introduce(record)
        self._actor_changed(record)

    def _failed(self, record: ActorRecord, failed: Failed) -> None:
        record.failure = failed
        record.failed_event.set()
        self._emit(
            "failed",
            {"actor": record.name, "error": failed.error, "traceback": failed.traceback},
        )

    def _actor_changed(self, record: ActorRecord) -> None:
        self._emit("actor", record.status(self._roster.node))
        self._on_change(self)

    # What users see.

    def summary(self) -> dict[str, Any]:
        """For `flowctl jobs`."""
        return {
            "name": self.name,
            "state": self.state,
            "step": self.metrics.get("policy_version", 0),
            "steps": self._roster.config.job.steps,
            "policy_version": self.metrics.get("policy_version", 0),
            "reward_mean": self.metrics.get("reward_mean"),
            "staleness_max": self.metrics.get("staleness_max"),
            "tokens_per_s": self.metrics.get("tokens_per_s"),
            "attempt": self.metrics.get("attempt", 0),
            "reason": self.reason,
            "error": self.error or (self.reason if self.outcome == "failed" else None),
        }

    def channels(self) -> list[dict[str, Any]]:
        """For `flowctl channels`."""
        reports = {record.name: record.report for record in self._roster.alive()}
        return edges(self.name, reports)

    def status(self) -> dict[str, Any]:
        """For `flowctl status`."""
        return {
            **self.summary(),
            "actors": [record.status(self._roster.node) for record in self.actors.values()],
        }
