"""What is known of one actor of a job, and of the process that it runs in. Data: starts and tells nothing."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.registry import PEERS
from channels.lifecycle import ActorSpec, Failed
from flowd.planner import Replica


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
    remote_address: str = ""  # over TCP, for other nodes
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
            "remote_address": self.remote_address,
            "waits_for": self.report.get("waits_for", ""),
            "time": self.report.get("time", {}),
        }


def records_of(replica: Replica) -> list[ActorRecord]:
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


def replica_of(ranks: list[ActorRecord]) -> Replica:
    """The replica of these ranks: the way back from `records_of`."""
    first = ranks[0]
    return Replica(
        id=first.replica,
        stage=first.kind,
        index=int(first.replica.rpartition("-")[2]),
        devices=tuple(device for rank in ranks for device in rank.devices),
    )


def meet(one: ActorRecord, other: ActorRecord) -> bool:
    """Whether two actors are introduced: kinds that talk, and ranks of one replica."""
    if one.kind == "trainer" and other.kind == "trainer":
        return one.replica == other.replica
    return other.kind in PEERS[one.kind]
