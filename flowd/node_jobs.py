"""The jobs of a node: made, launched, saved for the next flowd, and taken over from the last one.

Everything that must be known after a `kill -9` is in the store: a flowd that is started again within the actors' grace
adopts the fork server with its actors, and jobs go on as if nothing had happened; later than that, jobs are
`interrupted` and go on with `flowctl resume`.
"""

import asyncio
import logging
import shutil
import signal
import time
import uuid
from collections.abc import Sequence

from actors.job_config import JobConfig
from channels.endpoint import Endpoint
from channels.security import Security
from flowd import leftovers
from flowd.control import ENDED
from flowd.devices import Device
from flowd.errors import FlowdError, RequestError
from flowd.event_log import EventLog
from flowd.fork_server import ForkedProcess, ForkServer
from flowd.job import parse_resolved
from flowd.job_memory import JobMemory, last_metrics
from flowd.jobs import Job
from flowd.leases import LeaseTable
from flowd.leasing import LeaseShell
from flowd.paths import JobPlaces, StatePaths
from flowd.planner import Plan, plan
from flowd.processes import ProcessHandle
from flowd.store import JobRow, Store, noting
from flowd.supervisor import KILL_DEADLINE_S, remove_socket

log = logging.getLogger(__name__)


class NodeJobs:
    """One per flowd. `known` are the jobs of this flowd's life, those that ended included.

    listen: the TCP address of each actor's second mailbox, "" for none
    """

    def __init__(
        self,
        paths: StatePaths,
        store: Store,
        devices: Sequence[Device],
        *,
        fork_server: ForkServer,
        endpoint: Endpoint,
        events: EventLog,
        node: str,
        orphan_grace_s: float,
        listen: str,
        security: Security | None,
    ) -> None:
        self.known: dict[str, Job] = {}
        self.devices = devices
        self.node = node
        self._paths = paths
        self._store = store
        self._fork_server = fork_server
        self._endpoint = endpoint
        self._events = events
        self._orphan_grace_s = orphan_grace_s
        self._listen = listen
        self._security = security
        self._incarnation = uuid.uuid4().hex
        self._memory = JobMemory(store, node)
        self._launching: set[str] = set()
        budgets = {device.id: device.memory_bytes for device in devices}
        saved = store.document("leases")
        self._same_devices = saved is not None and saved.get("budgets") == budgets
        table = LeaseTable(budgets)
        if saved is not None and self._same_devices:
            table = LeaseTable.restore(saved, time.monotonic())
        self.leases = LeaseShell(table)

    def running(self) -> list[Job]:
        """The jobs that have not ended."""
        return [job for job in self.known.values() if job.state not in ENDED]

    def occupied(self) -> dict[str, str]:
        """Devices that a plan uses, each with the name of whose it is."""
        return {
            device: f'job "{job.name}"' for job in self.running() for device in job.plan.devices()
        }

    def check_heartbeats(self) -> None:
        """Have actors killed whose loop stands still."""
        for job in self.running():
            job.check_heartbeats(time.monotonic())

    # Start.

    def plan(self, config: JobConfig) -> Plan:
        """Which devices a new job gets; PlanError when it does not fit beside the others."""
        return plan(config, self.devices, self.occupied())

    def check_idle_name(self, name: str) -> None:
        """RequestError while a job of this name is coming up."""
        if name in self._launching:
            raise RequestError(f'job "{name}" is being started already')

    def make(self, name: str, config: JobConfig, made: Plan) -> Job:
        """A job of this node; nothing of it runs yet."""
        return Job(
            name,
            config,
            made,
            self.devices,
            endpoint=self._endpoint,
            leases=self.leases,
            spawn=self._fork_server.spawn,
            places=JobPlaces(
                run_dir=self._paths.run(name).root,
                socket_dir=self._paths.sockets,
                weights_dir=self._paths.weights / name,
                cache_dir=self._paths.cache,
                listen=self._listen,
                security=self._security,
            ),
            node=self.node,
            incarnation=self._incarnation,
            emit=lambda kind, data: self._events.emit(name, kind, data),
            on_end=self._ended,
            on_change=self._memory.save,
            orphan_grace_s=self._orphan_grace_s,
        )

    async def launch(self, job: Job) -> None:
        """Start a job's actors. FlowdError when that fails; the job has failed then."""
        self.known[job.name] = job
        self._launching.add(job.name)
        try:
            await job.start()
        except BaseException as error:
            await job.end("failed", f"its actors could not be started: {error}")
            if isinstance(error, FlowdError):
                raise FlowdError(f'job "{job.name}" did not start: {error}') from error
            raise
        finally:
            self._launching.discard(job.name)

    def _ended(self, job: Job) -> None:
        shutil.rmtree(job.places.weights_dir, ignore_errors=True)
        self._memory.save(job)

    # From one flowd to the next.

    async def recover(self) -> None:
        """Adopt the actors of a flowd that was killed, or note that its jobs were interrupted; end what it was ending.

        The fork server is there, or on its way, afterwards.
        """
        unfinished = [row for row in self._store.jobs() if row.state not in ENDED]
        to_end = [row for row in self._store.jobs() if self._memory.is_to_end(row)]
        handles: dict[int, ProcessHandle] = {}
        if unfinished:
            handles = {handle.pid: handle for handle in await self._fork_server.adopt()}
        why = "flowd was gone for longer than the actors' grace"
        if handles and not self._same_devices:
            handles = {}  # they compute on devices, under leases, that are not there any more
            why = "flowd was started again with other devices"
        if not handles:
            await self._fork_server.replace()
        for row in unfinished:
            if any(actor.pid in handles for actor in self._store.actors(row.name)):
                self._adopt(row, handles)
            else:
                way = f"`flowctl resume {row.name}` goes on from the last commit"
                self._note_end(row.name, "interrupted", why, f"{why}; {way}")
        await self._kill_unclaimed(handles)
        for row in to_end:
            self._note_end(
                row.name, row.state, "flowd was killed while it ended the job", row.error
            )
        for lease in list(self.leases.table):
            if lease.replica.partition("/")[0] not in self.known:
                self.leases.table.remove(lease.replica, time.monotonic())
        for directory in self._paths.weights.iterdir():
            if directory.name not in self.known:
                shutil.rmtree(directory, ignore_errors=True)
        leftovers.clear_aside(self._paths)
        self.leases.resend()
        self.leases.on_change = self._save_leases
        self._save_leases()

    async def _kill_unclaimed(self, handles: dict[int, ProcessHandle]) -> None:
        """End actors of jobs that are to end, and those that flowd was killed before it noted them."""
        for handle in handles.values():
            log.warning("actor=%s pid=%d belongs to no job that goes on", handle.name, handle.pid)
            handle.signal(signal.SIGKILL)
        if handles:
            exits = [handle.exited for handle in handles.values()]
            await asyncio.wait(exits, timeout=KILL_DEADLINE_S)

    def _note_end(self, job: str, state: str, reason: str, error: str | None) -> None:
        for record, _ in self._memory.actors(job):
            if record.address:
                remove_socket(record.address)
        self._memory.ended(job, state, error)
        self._events.emit(job, "job", {"state": state, "reason": reason, "error": error})

    def _adopt(self, row: JobRow, handles: dict[int, ProcessHandle]) -> None:
        config = parse_resolved(row.config, row.name)
        job = self.make(row.name, config, self._memory.plan(row.name))
        job.state = row.state
        job.metrics = last_metrics(self._paths.run(row.name).metrics)
        self.known[row.name] = job
        actors = self._memory.actors(row.name)
        log.info("job=%s adopted actors=%d", row.name, len(actors))
        for record, pid in actors:
            handle = handles.pop(pid or 0, None)
            if handle is not None:
                job.adopt(record, ForkedProcess(handle))
            else:
                job.lost_while_away(record)
        job.settle()

    def _save_leases(self) -> None:
        with noting():
            self._store.put_document("leases", self.leases.table.snapshot())
