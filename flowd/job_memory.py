"""What a flowd keeps of its jobs for the next one: state, plan and actors, in the store.

A job that is found there is adopted when its actors still run, and noted as interrupted when they do not.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from flowd.actor_record import ActorRecord
from flowd.control import ENDED
from flowd.jobs import Job
from flowd.planner import Plan
from flowd.processes import process_start_time
from flowd.store import ActorRow, JobRow, Store, noting


class JobMemory:
    """One per flowd."""

    def __init__(self, store: Store, node: str) -> None:
        self._store = store
        self._node = node

    def save(self, job: Job) -> None:
        """Keep what another flowd needs to adopt the job.

        The state is written ahead: a job that is to end has its last state, and actors that are not gone.
        """
        state = job.outcome or job.state
        with noting(), self._store.transaction():
            self._store.set_job(job.name, state=state, error=job.summary()["error"])
            self._store.put_document(f"plan/{job.name}", asdict(job.plan))
            known = {row.name for row in self._store.actors(job.name)}
            for record in job.actors.values():
                known.discard(record.name)
                self._store.put_actor(self._row(job.name, record))
            for name in known:
                self._store.remove_actor(job.name, name)

    def ended(self, job: str, state: str, error: str | None) -> None:
        """A job of an earlier flowd has ended, and none of its actors is left."""
        with self._store.transaction():
            self._store.set_job(job, state=state, error=error)
            for row in self._store.actors(job):
                self._store.remove_actor(job, row.name)

    def is_to_end(self, row: JobRow) -> bool:
        """Whether a flowd was killed after it decided that a job ends, and before its last actor was gone."""
        return row.state in ENDED and any(a.state != "gone" for a in self._store.actors(row.name))

    def plan(self, job: str) -> Plan:
        """The plan of a job that was saved."""
        saved = self._store.document(f"plan/{job}")
        assert saved is not None
        return msgspec.convert(saved, Plan)

    def actors(self, job: str) -> list[tuple[ActorRecord, int | None]]:
        """The actors of a job that was saved, each with its pid."""
        rows = self._store.actors(job)
        replicas = [row.name.partition(".")[0] for row in rows]
        return [
            (
                ActorRecord(
                    name=row.name,
                    kind=row.kind,
                    replica=replica,
                    rank=int(row.name.partition(".")[2] or 0),
                    num_ranks=replicas.count(replica),
                    devices=row.devices,
                    epoch=row.epoch,
                    address=row.address,
                    restarts=row.restarts,
                ),
                row.pid,
            )
            for row, replica in zip(rows, replicas, strict=True)
        ]

    def _row(self, job: str, record: ActorRecord) -> ActorRow:
        pid = record.process.pid if record.process is not None else None
        return ActorRow(
            job=job,
            name=record.name,
            kind=record.kind,
            epoch=record.epoch,
            node=self._node,
            state=record.state,
            pid=pid,
            start_time=process_start_time(pid) if pid is not None else None,
            devices=record.devices,
            restarts=record.restarts,
            address=record.address,
        )


def last_metrics(path: Path) -> dict[str, Any]:
    """The last step's line of a metrics.jsonl, read from its end; lines of evaluations are passed over."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            lines = file.read().splitlines()
        steps = (line for line in reversed(lines) if b'"policy_version"' in line)
        return dict(json.loads(next(steps, b"{}")))
    except (OSError, ValueError):
        return {}
