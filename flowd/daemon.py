"""The daemon of a node: owns its devices, its actor processes and its jobs; answers flowctl.

It brokers and watches, and carries no tensor. Everything it must know after a `kill -9` is in the store: a flowd that
is started again within the actors' grace adopts the fork server with its actors, and jobs go on as if nothing had
happened; later than that, jobs are `interrupted` and go on with `flowctl resume`.
"""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import zmq

from actors.job_config import JobConfig
from channels import messages
from channels.control import CtlProgress, CtlReply, CtlRequest
from channels.endpoint import ZmqEndpoint
from channels.errors import BadFrame, PeerLost
from channels.lifecycle import FLOWD, ActorSpec
from channels.messages import Message
from channels.sockets import DrainedSocket
from flowd import lockfile
from flowd.control import ENDED, ControlDesk
from flowd.devices import Device
from flowd.errors import FlowdError, RequestError, UnknownJob
from flowd.job import parse_job, parse_resolved
from flowd.jobs import ActorRecord, Job, JobPlaces, Process
from flowd.leases import LeaseTable
from flowd.leasing import LeaseShell
from flowd.paths import StatePaths
from flowd.planner import Plan, plan
from flowd.processes import (
    DEFAULT_PRELOAD,
    SOCKET_NAME,
    ProcessHandle,
    ZygoteClient,
    ZygoteLost,
    process_start_time,
)
from flowd.runs import unknown_job
from flowd.store import ActorRow, JobRow, Store, StoreError

log = logging.getLogger(__name__)

ACTOR_ENTRY = "actors.main:run"
PRELOAD = (
    *DEFAULT_PRELOAD,
    "actors.conductor.actor",
    "actors.env.actor",
    "actors.rollout.actor",
    "actors.trainer.actor",
    "actors.trainer.building",
    "actors.backends.hf_engine",
    "actors.models.text_policy",
    "torch.utils.tensorboard.writer",
)
CHECK_S = 1.0
SUBSCRIBER_BOUND = 10_000
UNIMPORTANT = frozenset({"actor", "step", "warmup", "commit"})  # not kept in the event table


def serve(
    paths: StatePaths,
    devices: list[Device],
    *,
    listen: str | None,
    ready: Callable[[], None],
    orphan_grace_s: float = 30.0,
) -> int:
    """Run flowd in this process until it is told to stop; `ready` is called once it answers."""
    if listen is not None:
        raise RequestError(
            f"--listen {listen}: this flowd serves one node over local sockets; leave --listen out"
        )
    lock = lockfile.acquire(paths.lock)
    try:
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s %(message)s",
            handlers=[logging.FileHandler(paths.log)],
        )
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(paths, devices, lock, ready, orphan_grace_s))
    finally:
        lock.release()


async def _serve(
    paths: StatePaths,
    devices: list[Device],
    lock: lockfile.HeldLock,
    ready: Callable[[], None],
    orphan_grace_s: float,
) -> int:
    daemon = FlowdDaemon(paths, devices, orphan_grace_s)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, daemon.signalled, number)
    try:
        await daemon.start()
        lock.announce(paths.control_address)
        ready()
        await daemon.stopping.wait()
    finally:
        await daemon.close()
    return 0


class FlowdDaemon:
    """See the module docstring. `flowd.control.Daemon` says what the commands ask of it."""

    def __init__(self, paths: StatePaths, devices: list[Device], orphan_grace_s: float) -> None:
        self.paths = paths
        self.stopping = asyncio.Event()
        self.incarnation = uuid.uuid4().hex
        self.node = socket.gethostname()
        self._devices = devices
        self._orphan_grace_s = orphan_grace_s
        self._jobs: dict[str, Job] = {}
        self._subscribers: dict[asyncio.Queue[dict[str, Any]], str | None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._desk = ControlDesk(self)
        self._zygote: asyncio.Task[ZygoteClient] | None = None
        self._store: Store | None = None
        self._signals = 0
        self._submitting: set[str] = set()
        self._same_devices = False  # as the last flowd had

    # Start and end.

    async def start(self) -> None:
        """Bind the sockets, read the state, adopt what still runs; the fork server starts beside."""
        for directory in (self.paths.runs, self.paths.cache, self.paths.weights):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = Store(self.paths.root)
        self._leases = LeaseShell(self._table())
        sockets = self.paths.sockets
        self._endpoint = ZmqEndpoint(FLOWD, f"ipc://{sockets / 'flowd.sock'}")
        self._endpoint.on_message = self._on_message
        router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.SNDHWM, 0)  # a slow follower is not one that left
        router.bind(self.paths.control_address)
        self._control = DrainedSocket(router, self._on_request)
        await self._recover()
        self._task(self._check(), "check")

    def _table(self) -> LeaseTable:
        """The lease table of the last flowd if its devices are ours; jobs that ended have no lease."""
        budgets = {device.id: device.memory_bytes for device in self._devices}
        assert self._store is not None
        saved = self._store.document("leases")
        self._same_devices = saved is not None and saved.get("budgets") == budgets
        if saved is not None and self._same_devices:
            return LeaseTable.restore(saved, time.monotonic())
        return LeaseTable(budgets)

    def _save_leases(self) -> None:
        if self._store is not None:
            with _noting():
                self._store.put_document("leases", self._leases.table.snapshot())

    async def _recover(self) -> None:
        """Adopt the actors of a flowd that was killed, or note that its jobs were interrupted."""
        assert self._store is not None
        running = [row for row in self._store.jobs() if row.state not in ENDED]
        handles: dict[int, ProcessHandle] = {}
        client = ZygoteClient(self._zygote_lost)
        if running:
            with contextlib.suppress(ZygoteLost):
                found = await client.adopt(self.paths.sockets / SOCKET_NAME)
                handles = {handle.pid: handle for handle in found}
        why = "flowd was gone for longer than the actors' grace"
        if handles and not self._same_devices:
            handles = {}  # they compute on devices, under leases, that are not there any more
            why = "flowd was started again with other devices"
        if handles:
            self._zygote = self._task(_value(client), "zygote")
        else:
            if client.pid:
                await client.stop()
            self._zygote = self._task(self._start_zygote(), "zygote")
        names = set()
        for row in running:
            rows = self._store.actors(row.name)
            alive = [r for r in rows if r.pid in handles]
            if alive:
                names.add(row.name)
                self._adopt(row, rows, handles)
            else:
                self._store.set_job(
                    row.name,
                    state="interrupted",
                    error=f"{why}; `flowctl resume {row.name}` goes on from the last commit",
                )
        for lease in list(self._leases.table):
            if lease.replica.partition("/")[0] not in names:
                self._leases.table.remove(lease.replica, time.monotonic())
        for directory in self.paths.weights.iterdir():
            if directory.name not in names:
                shutil.rmtree(directory, ignore_errors=True)
        self._leases.resend()
        self._leases.on_change = self._save_leases
        self._save_leases()

    def _adopt(self, row: JobRow, rows: list[ActorRow], handles: dict[int, ProcessHandle]) -> None:
        assert self._store is not None
        saved = self._store.document(f"plan/{row.name}")
        assert saved is not None
        job = self._make_job(
            row.name, parse_resolved(row.config, row.name), msgspec.convert(saved, Plan)
        )
        job.state = row.state
        job.metrics = _last_metrics(self.paths.run(row.name).metrics)
        self._jobs[row.name] = job
        log.info("job=%s adopted actors=%d", row.name, len(rows))
        for actor in rows:
            replica = actor.name.partition(".")[0]
            ranks = [a for a in rows if a.name.partition(".")[0] == replica]
            record = ActorRecord(
                name=actor.name,
                kind=actor.kind,
                replica=replica,
                rank=int(actor.name.partition(".")[2] or 0),
                num_ranks=len(ranks),
                devices=actor.devices,
                epoch=actor.epoch,
                address=actor.address,
                restarts=actor.restarts,
            )
            handle = handles.get(actor.pid or 0)
            if handle is not None:
                job.adopt(record, _ActorProcess(handle))
            else:
                job.lost_while_away(record)
        job.settle()

    async def _start_zygote(self) -> ZygoteClient:
        client = ZygoteClient(self._zygote_lost)
        await client.start(self.paths.root, PRELOAD, self._orphan_grace_s)
        return client

    def _zygote_lost(self, reason: str) -> None:
        """The fork server died, and with it every actor: start another, jobs go on from there."""
        if not self.stopping.is_set():
            log.error("zygote lost: %s", reason)
            self._zygote = self._task(self._start_zygote(), "zygote")

    def signalled(self, number: int) -> None:
        """A first signal asks for an orderly end, a second one is final."""
        self._signals += 1
        log.info("signal=%s", signal.Signals(number).name)
        if self._signals > 1:
            os._exit(128 + number)  # the zygote sees it and ends every actor after the grace
        self.request_shutdown()

    def request_shutdown(self) -> None:
        """Ask for an orderly end."""
        log.info("stopping pid=%d", os.getpid())
        self.stopping.set()

    async def close(self) -> None:
        """Stop everything that was started."""
        await asyncio.gather(
            *(
                job.end("interrupted", "flowd was stopped")
                for job in self._jobs.values()
                if job.state not in ENDED
            ),
            return_exceptions=True,
        )
        if self._zygote is not None:
            if not any(job.actors for job in self._jobs.values()):
                self._zygote.cancel()  # of effect only while it still imports
            outcome = (await asyncio.gather(self._zygote, return_exceptions=True))[0]
            if isinstance(outcome, ZygoteClient):
                await outcome.stop()
        for task in list(self._tasks):
            task.cancel()
        self._leases.close()
        self._control.close(linger_ms=200)
        self._endpoint.close()
        for name in ("control.sock", "flowd.sock"):
            (self.paths.sockets / name).unlink(missing_ok=True)
        shutil.rmtree(self.paths.weights, ignore_errors=True)
        if self._store is not None:
            self._store.close()
            self._store = None

    def _task(self, work: Any, name: str) -> "asyncio.Task[Any]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("task=%s failed", task.get_name(), exc_info=task.exception())

    async def _check(self) -> None:
        """Look for actors whose loop stands still."""
        while True:
            await asyncio.sleep(CHECK_S)
            for job in list(self._jobs.values()):
                if job.state not in ENDED:
                    job.check_heartbeats(time.monotonic())

    # Messages.

    def _on_message(self, sender: str, message: Message, payload: Any) -> None:
        name, _, actor = sender.rpartition("/")
        job = self._jobs.get(name)
        if job is not None:
            job.receive(actor, message)

    def _on_request(self, frames: list[zmq.Frame]) -> None:
        identity = frames[0].bytes
        try:
            request = messages.decode(frames[-1].bytes)
        except BadFrame as error:
            log.warning("bad request dropped: %s", error)
            return
        if isinstance(request, CtlRequest):

            async def send(answer: CtlProgress | CtlReply) -> None:
                try:
                    self._control.send([identity, messages.encode(answer)])
                except zmq.ZMQError as error:
                    raise PeerLost(f"the client of {request.command} has left") from error

            self._task(self._desk.take(request, send), f"ctl-{request.command}")

    # What commands ask for.

    async def submit(self, name: str, config: JobConfig, toml_text: str) -> dict[str, Any]:
        """Start a job; returns its status at once."""
        assert self._store is not None
        run_dir = self.paths.run(name).root
        if self._store.job(name) is None and run_dir.exists():
            raise RequestError(
                f'job "{name}" exists already: {run_dir} is of a run that this flowd does not know; '
                f"move it away, or give this job another name with --set job.name={name}-2"
            )
        if self._store.job(name) is not None:
            raise RequestError(
                f'job "{name}" exists already: `flowctl resume {name}` goes on with it, or give this one '
                f"another name with --set job.name={name}-2"
            )
        self._check_idle_name(name)
        row = JobRow(name=name, state="starting", config=toml_text, created=time.time())
        job = self._make_job(name, config, self._plan(config))
        job.places.run_dir.mkdir(parents=True)
        (job.places.run_dir / "job.toml").write_text(toml_text)
        self._store.put_job(row)
        await self._launch(job)
        return job.status()

    def _check_idle_name(self, name: str) -> None:
        if name in self._submitting:
            raise RequestError(f'job "{name}" is being started already')

    async def _launch(self, job: Job) -> None:
        self._jobs[job.name] = job
        self._submitting.add(job.name)
        try:
            await job.start()
        except BaseException as error:
            await job.end("failed", f"its actors could not be started: {_first(error)}")
            if isinstance(error, FlowdError | BaseExceptionGroup):
                raise FlowdError(f'job "{job.name}" did not start: {_first(error)}') from error
            raise
        finally:
            self._submitting.discard(job.name)

    async def resume(self, job: str) -> dict[str, Any]:
        """Go on with an ended job from its last commit."""
        assert self._store is not None
        row = self._known(job)
        current = self._jobs.get(job)
        if current is not None and current.state not in ENDED:
            raise RequestError(f'job "{job}" is {current.state}: only a job that ended is resumed')
        if row.state == "done":
            raise RequestError(
                f'job "{job}" is done: to train on, submit it under another name with more steps'
            )
        self._check_idle_name(job)
        config = parse_job(row.config, job)
        resumed = self._make_job(job, config, self._plan(config))
        resumed.metrics = _last_metrics(self.paths.run(job).metrics)
        await self._launch(resumed)
        return resumed.status()

    def _plan(self, config: JobConfig) -> Plan:
        return plan(config, self._devices, self._occupied())

    def _occupied(self) -> dict[str, str]:
        return {
            device: f'job "{job.name}"'
            for job in self._jobs.values()
            if job.state not in ENDED
            for device in job.plan.devices()
        }

    def _make_job(self, name: str, config: JobConfig, made: Plan) -> Job:
        return Job(
            name,
            config,
            made,
            self._devices,
            endpoint=self._endpoint,
            leases=self._leases,
            spawn=self._spawn,
            places=JobPlaces(
                run_dir=self.paths.run(name).root,
                socket_dir=self.paths.sockets,
                weights_dir=self.paths.weights / name,
                cache_dir=self.paths.cache,
            ),
            node=self.node,
            incarnation=self.incarnation,
            emit=lambda kind, data: self._emit(name, kind, data),
            on_end=self._job_ended,
            on_change=self._save_job,
            orphan_grace_s=self._orphan_grace_s,
        )

    async def _spawn(self, spec: ActorSpec, python: str | None) -> Process:
        if self._zygote is None or (self._zygote.done() and self._zygote.exception() is not None):
            self._zygote = self._task(self._start_zygote(), "zygote")  # the last try failed
        client = await asyncio.shield(self._zygote)
        devices = [device for device in self._devices if device.id in spec.devices]
        handle = await client.spawn(
            ACTOR_ENTRY,
            msgspec.msgpack.encode(spec),
            name=spec.actor,
            log_path=Path(spec.run_dir) / "logs" / f"{spec.actor}.log",
            environment={
                # GPUs by UUID: numbers depend on CUDA_DEVICE_ORDER. Actors without one see none.
                "CUDA_VISIBLE_DEVICES": ",".join(d.uuid for d in devices if d.uuid),
                "FLOWD_TORCH_THREADS": str(spec.threads),
            },
            python=python,
        )
        return _ActorProcess(handle)

    def _save_job(self, job: Job) -> None:
        """What another flowd needs to adopt the job."""
        if self._store is None:
            return
        with _noting(), self._store.transaction():
            self._store.set_job(job.name, state=job.state, error=job.summary()["error"])
            self._store.put_document(f"plan/{job.name}", asdict(job.plan))
            known = {row.name for row in self._store.actors(job.name)}
            for record in job.actors.values():
                known.discard(record.name)
                process = record.process
                pid = process.pid if process is not None else None
                self._store.put_actor(
                    ActorRow(
                        job=job.name,
                        name=record.name,
                        kind=record.kind,
                        epoch=record.epoch,
                        node=self.node,
                        state=record.state,
                        pid=pid,
                        start_time=process_start_time(pid) if pid is not None else None,
                        devices=record.devices,
                        restarts=record.restarts,
                        address=record.address,
                    )
                )
            for name in known:
                self._store.remove_actor(job.name, name)

    def _job_ended(self, job: Job) -> None:
        shutil.rmtree(job.places.weights_dir, ignore_errors=True)
        self._save_job(job)

    async def cancel(self, job: str) -> dict[str, Any]:
        """Stop a job."""
        row = self._known(job)
        running = self._jobs.get(job)
        if running is None or running.state in ENDED:
            raise RequestError(f'job "{job}" is {row.state}: there is nothing to cancel')
        await running.end("cancelled", "cancelled by the user")
        return running.status()

    async def scale(
        self, job: str, stage: str, change: str, from_stage: str | None
    ) -> dict[str, Any]:
        """Carry out `flowctl scale`."""
        row = self._known(job)
        running = self._jobs.get(job)
        if running is None or running.state != "running":
            raise RequestError(
                f'job "{job}" is {running.state if running else row.state}: '
                "only a running job can be scaled"
            )
        occupied = self._occupied()
        idle = [device for device in self._devices if device.id not in occupied]
        return await running.scale(stage, change, idle, from_stage)

    def jobs(self) -> list[dict[str, Any]]:
        """The status of every job, without actors, oldest first."""
        assert self._store is not None
        return [self._summary(row) for row in self._store.jobs()]

    def status(self, job: str) -> dict[str, Any]:
        """One job with its actors."""
        row = self._known(job)
        running = self._jobs.get(job)
        return running.status() if running is not None else {**self._summary(row), "actors": []}

    def _summary(self, row: JobRow) -> dict[str, Any]:
        running = self._jobs.get(row.name)
        if running is not None:
            return running.summary()
        last = _last_metrics(self.paths.run(row.name).metrics)
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
        assert self._store is not None
        row = self._store.job(name)
        if row is None:
            raise UnknownJob(unknown_job(name, [known.name for known in self._store.jobs()]))
        return row

    def devices(self) -> list[dict[str, Any]]:
        """What the node has, and who holds it."""
        rows = []
        for device in self._devices:
            here = [lease for lease in self._leases.table if device.id in lease.devices]
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
        actors = sum(len(job.actors) for job in self._jobs.values() if job.state not in ENDED)
        return [
            {
                "name": self.node,
                "state": "up",
                "pid": os.getpid(),
                "devices": len(self._devices),
                "actors": actors,
            }
        ]

    def events(self, job: str | None, after_id: int, limit: int) -> list[dict[str, Any]]:
        """Events with id > after_id, oldest first."""
        assert self._store is not None
        rows = self._store.events(after=after_id, job=job, limit=limit)
        return [
            {"id": row.id, "time": row.time, "job": row.job, "kind": row.kind, **row.data}
            for row in rows
        ]

    def subscribe(self, job: str | None) -> AsyncIterator[dict[str, Any]]:
        """Updates from this call on."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(SUBSCRIBER_BOUND)
        self._subscribers[queue] = job
        return _Subscription(queue, lambda: self._subscribers.pop(queue, None))

    def _emit(self, job: str, kind: str, data: dict[str, Any]) -> None:
        """Tell followers, and keep what is worth keeping."""
        now = time.time()
        if self._store is not None and kind not in UNIMPORTANT:
            with _noting():
                self._store.add_event(now, kind, job=job, actor=data.get("actor"), data=data)
        if kind not in ("actor", "step", "warmup"):
            line = json.dumps({"time": round(now, 3), "kind": kind, **data})
            with contextlib.suppress(OSError), self.paths.run(job).events.open("a") as file:
                file.write(line + "\n")
        body = {"metrics": data} if kind == "step" else data
        update = {"event": kind, "job": job, **body}
        for queue, wanted in self._subscribers.items():
            if wanted in (None, job) and not queue.full():
                queue.put_nowait(update)


class _Subscription:
    """Updates as they come. An iterator of its own: a generator that was never begun cannot be closed."""

    def __init__(self, queue: "asyncio.Queue[dict[str, Any]]", close: Callable[[], object]) -> None:
        self._queue = queue
        self._close = close

    def __aiter__(self) -> "_Subscription":
        return self

    async def __anext__(self) -> dict[str, Any]:
        return await self._queue.get()

    async def aclose(self) -> None:
        """Take no more updates."""
        self._close()


class _ActorProcess:
    """A process of the fork server, as a job sees it."""

    def __init__(self, handle: ProcessHandle) -> None:
        self.pid = handle.pid
        self.exited: asyncio.Future[Any] = handle.exited
        self._handle = handle

    def kill(self) -> None:
        with contextlib.suppress(ZygoteLost):  # then it is dead already
            self._handle.signal(signal.SIGKILL)


@contextlib.contextmanager
def _noting() -> Iterator[None]:
    """A full disk must not keep flowd from restarting, ending and stopping what it runs."""
    try:
        yield
    except StoreError as error:
        log.error("state was not saved: %s", error)


async def _value(client: ZygoteClient) -> ZygoteClient:
    return client


def _first(error: BaseException) -> BaseException:
    """The first leaf of a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last line of a metrics.jsonl, read from its end."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            lines = file.read().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, ValueError):
        return {}
