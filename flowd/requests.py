"""What flowctl may ask of a flowd: starts, ends and changes jobs, and tells what there is."""

import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from typing import Any

from actors.job_config import JobConfig
from flowd.control import ENDED
from flowd.errors import RequestError, UnknownJob
from flowd.event_log import EventLog
from flowd.job import dump_job, parse_job, parse_resolved
from flowd.job_memory import last_metrics
from flowd.node_jobs import NodeJobs
from flowd.paths import StatePaths
from flowd.resumed import refuse_changes, replace_text
from flowd.runs import last_state, unknown_job
from flowd.store import JobRow, Store


class Requests:
    """One per flowd. `flowd.control.Daemon` says what each of them takes and gives."""

    def __init__(
        self,
        paths: StatePaths,
        store: Store,
        jobs: NodeJobs,
        events: EventLog,
        request_shutdown: Callable[[], None],
    ) -> None:
        self._paths = paths
        self._store = store
        self._jobs = jobs
        self._events = events
        self._request_shutdown = request_shutdown

    def request_shutdown(self) -> None:
        """Ask for an orderly end."""
        self._request_shutdown()

    # Jobs.

    async def submit(self, name: str, config: JobConfig, toml_text: str) -> dict[str, Any]:
        """Start a job; returns its status at once."""
        run_dir = self._paths.run(name).root
        row = self._store.job(name)
        if row is not None or self._paths.run(name).job_toml.exists():
            state = row.state if row is not None else last_state(self._paths.run(name))
            resumed = f"`flowctl resume {name}` goes on with it, or "
            raise RequestError(
                f'job "{name}" exists already{f" and is {state}" if state else ""}: '
                f"{resumed if state in ENDED - {'done'} else ''}give this one another name with "
                f"--set job.name={name}-2"
            )
        if run_dir.exists():
            raise RequestError(
                f'job "{name}" would write into {run_dir}, which exists and holds no job; move it away, or give '
                f"this job another name with --set job.name={name}-2"
            )
        self._jobs.check_idle_name(name)
        row = JobRow(name=name, state="starting", config=toml_text, created=time.time())
        job = self._jobs.make(name, config, self._jobs.plan(config))
        job.places.run_dir.mkdir(parents=True)
        (job.places.run_dir / "job.toml").write_text(toml_text)
        self._store.put_job(row)
        await self._jobs.launch(job)
        return job.status()

    async def resume(self, job: str, toml_text: str | None = None) -> dict[str, Any]:
        """Go on with an ended job from its last commit, also with one of which only the run directory is left.

        toml_text: the job with changes; it replaces the resolved one
        """
        lost = self._store.job(job) is None
        row = self._rebuilt(job) if lost else self._known(job)
        current = self._jobs.known.get(job)
        if current is not None and current.state not in ENDED:
            raise RequestError(f'job "{job}" is {current.state}: only a job that ended is resumed')
        before = parse_resolved(row.config, job)
        config = parse_job(row.config if toml_text is None else toml_text, job)
        refuse_changes(before, config)
        if row.state == "done" and config.job.steps <= before.job.steps:
            raise RequestError(
                f'job "{job}" is done: to train on, resume it with more steps, '
                f"--set job.steps={2 * before.job.steps}"
            )
        self._jobs.check_idle_name(job)
        run_dir = self._paths.run(job).root
        if not run_dir.is_dir():
            raise RequestError(
                f'job "{job}" cannot go on: {run_dir}, with its commits, is gone; submit it again '
                f"under another name, with --set job.name={job}-2"
            )
        resumed = self._jobs.make(job, config, self._jobs.plan(config))
        resumed.metrics = last_metrics(self._paths.run(job).metrics)
        if toml_text is not None:
            row = replace(row, config=dump_job(config))
            replace_text(self._paths.run(job).job_toml, row.config)
        if lost or toml_text is not None:
            self._store.put_job(row)
        await self._jobs.launch(resumed)
        return resumed.status()

    def _rebuilt(self, name: str) -> JobRow:
        """What the database lost of a job (deleted, or the run was copied here), from its run directory."""
        runs = sorted(path.parent.name for path in self._paths.runs.glob("*/job.toml"))
        if name not in runs:
            known = [row.name for row in self._store.jobs()]
            raise UnknownJob(unknown_job(name, sorted({*known, *runs})))
        run = self._paths.run(name)
        text = run.job_toml.read_text()
        config = parse_resolved(text, str(run.job_toml))
        if config.job.name != name:
            raise RequestError(
                f'{run.job_toml} is of job "{config.job.name}", and its directory is named "{name}"; '
                "a run keeps the name of its job: rename the directory back"
            )
        state = last_state(run)
        return JobRow(
            name=name,
            state=state if state in ENDED else "interrupted",
            config=text,
            created=run.job_toml.stat().st_mtime,
        )

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job."""
        row = self._known(job)
        running = self._jobs.known.get(job)
        if running is None or running.state in ENDED:
            raise RequestError(f'job "{job}" is {row.state}: there is nothing to cancel')
        await running.end("cancelled", "cancelled by the user")
        return running.status()

    async def scale(
        self, job: str, stage: str, change: str, from_stage: str | None
    ) -> dict[str, Any]:
        """Carry out `flowctl scale`."""
        row = self._known(job)
        running = self._jobs.known.get(job)
        if running is None or running.state != "running":
            raise RequestError(
                f'job "{job}" is {running.state if running else row.state}: '
                "only a running job can be scaled"
            )
        occupied = self._jobs.occupied()
        idle = [device for device in self._jobs.devices if device.id not in occupied]
        return await running.scale(stage, change, idle, from_stage)

    # What there is.

    def jobs(self) -> list[dict[str, Any]]:
        """The status of every job, without actors, oldest first."""
        return [self._summary(row) for row in self._store.jobs()]

    def status(self, job: str) -> dict[str, Any]:
        """One job with its actors."""
        row = self._known(job)
        running = self._jobs.known.get(job)
        return running.status() if running is not None else {**self._summary(row), "actors": []}

    def channels(self, job: str) -> list[dict[str, Any]]:
        """The edges of a job that runs."""
        row = self._known(job)
        running = self._jobs.known.get(job)
        if running is None or running.state in ENDED:
            raise RequestError(f'job "{job}" is {row.state}: channels are there while a job runs')
        return running.channels()

    def _summary(self, row: JobRow) -> dict[str, Any]:
        running = self._jobs.known.get(row.name)
        if running is not None:
            return running.summary()
        last = last_metrics(self._paths.run(row.name).metrics)
        return {
            "name": row.name,
            "state": row.state,
            "step": last.get("policy_version", 0),
            "steps": parse_resolved(row.config, row.name).job.steps,
            "policy_version": last.get("policy_version", 0),
            "reward_mean": last.get("reward_mean"),
            "staleness_max": last.get("staleness_max"),
            "tokens_per_s": None,
            "attempt": last.get("attempt", 0),
            "reason": "",
            "error": row.error,
        }

    def _known(self, name: str) -> JobRow:
        row = self._store.job(name)
        if row is None:
            raise UnknownJob(unknown_job(name, [known.name for known in self._store.jobs()]))
        return row

    def devices(self) -> list[dict[str, Any]]:
        """What the node has, and who holds it."""
        rows = []
        for device in self._jobs.devices:
            here = [lease for lease in self._jobs.leases.table if device.id in lease.devices]
            rows.append(
                {
                    **asdict(device),
                    "holders": [
                        f"{lease.replica}{'' if lease.computing else ' (parked)'}" for lease in here
                    ],
                }
            )
        return rows

    def nodes(self) -> list[dict[str, Any]]:
        """This node."""
        actors = sum(len(job.actors) for job in self._jobs.running())
        return [
            {
                "name": self._jobs.node,
                "state": "up",
                "pid": os.getpid(),
                "devices": len(self._jobs.devices),
                "actors": actors,
            }
        ]

    def events(self, job: str | None, after_id: int, limit: int) -> list[dict[str, Any]]:
        """Events with id > after_id, oldest first."""
        return self._events.after(after_id, job, limit)

    def subscribe(self, job: str | None) -> AsyncIterator[dict[str, Any]]:
        """Updates from this call on."""
        return self._events.subscribe(job)
