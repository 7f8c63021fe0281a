"""The daemon of a node: a process that holds the node's lock, binds its sockets and owns what runs behind them.

It brokers and watches, and carries no tensor. The jobs are `node_jobs`, what flowctl asks for is `requests`, the
processes are `fork_server`.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable
from typing import Any

import zmq

from channels import messages
from channels.control import CtlProgress, CtlReply, CtlRequest
from channels.errors import BadFrame, ChannelError, PeerLost
from channels.lifecycle import FLOWD
from channels.messages import Message
from channels.security import Security
from channels.socket_endpoint import SocketEndpoint
from channels.sockets import DrainedSocket
from flowd import lockfile
from flowd.auth import cluster_key
from flowd.control import ControlDesk
from flowd.devices import Device
from flowd.errors import RequestError
from flowd.event_log import EventLog
from flowd.fork_server import ForkServer
from flowd.node_jobs import NodeJobs
from flowd.paths import StatePaths
from flowd.requests import Requests
from flowd.store import Store
from flowd.tasks import Tasks

log = logging.getLogger(__name__)

CHECK_S = 1.0


def serve(
    paths: StatePaths,
    devices: list[Device],
    *,
    listen: str = "",
    plain_bulk: bool = False,
    ready: Callable[[], None],
    orphan_grace_s: float = 30.0,
) -> int:
    """Run flowd in this process until it is told to stop; `ready` is called once it answers.

    listen: "tcp://IP:PORT" of its mailbox for other nodes; its actors have theirs at that IP    plain_bulk: see
    `channels.security.Security`
    """
    lock = lockfile.acquire(paths.lock)
    try:
        logging.basicConfig(
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(name)s %(message)s",
            handlers=[logging.FileHandler(paths.log)],
        )
        security = Security(cluster_key(paths.cluster_key), plain_bulk) if listen else None
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(paths, devices, lock, ready, orphan_grace_s, listen, security))
    finally:
        lock.release()


async def _serve(
    paths: StatePaths,
    devices: list[Device],
    lock: lockfile.HeldLock,
    ready: Callable[[], None],
    orphan_grace_s: float,
    listen: str,
    security: Security | None,
) -> int:
    daemon = FlowdDaemon(paths, devices, orphan_grace_s, listen, security)
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
    """See the module docstring. Made within the loop; binds the sockets at once."""

    def __init__(
        self,
        paths: StatePaths,
        devices: list[Device],
        orphan_grace_s: float,
        listen: str,
        security: Security | None,
    ) -> None:
        self.paths = paths
        self.stopping = asyncio.Event()
        self._signals = 0
        self._tasks = Tasks("flowd")
        try:
            self._endpoint = SocketEndpoint(
                FLOWD, f"ipc://{paths.sockets / 'flowd.sock'}", listen=listen, security=security
            )
        except ChannelError as error:
            raise RequestError(f"flowd cannot listen: {error}") from error
        for directory in (paths.runs, paths.cache, paths.weights):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._store = Store(paths.root)
        self._fork_server = ForkServer(paths, devices, self._tasks, orphan_grace_s)
        self._endpoint.on_message = self._on_message
        events = EventLog(paths, self._store)
        self._jobs = NodeJobs(
            paths,
            self._store,
            devices,
            fork_server=self._fork_server,
            endpoint=self._endpoint,
            events=events,
            node=socket.gethostname(),
            orphan_grace_s=orphan_grace_s,
            listen=f"{listen.rpartition(':')[0]}:*" if listen else "",
            security=security,
        )
        requests = Requests(paths, self._store, self._jobs, events, self.request_shutdown)
        self._desk = ControlDesk(requests)
        router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.setsockopt(zmq.SNDHWM, 0)  # a slow follower is not one that left
        router.bind(paths.control_address)
        self._control = DrainedSocket(router, self._on_request)

    async def start(self) -> None:
        """Adopt what still runs, start to watch; a fork server that is needed starts beside."""
        await self._jobs.recover()
        self._tasks.start(self._check(), "check")

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
        self.stopping.set()
        await asyncio.gather(
            *(job.end("interrupted", "flowd was stopped") for job in self._jobs.running()),
            return_exceptions=True,
        )
        no_actors = not any(job.actors for job in self._jobs.known.values())
        await self._fork_server.stop(at_once=no_actors)
        self._tasks.cancel()
        self._jobs.leases.close()
        self._control.close(linger_ms=200)
        self._endpoint.close()
        for name in ("control.sock", "flowd.sock"):
            (self.paths.sockets / name).unlink(missing_ok=True)
        shutil.rmtree(self.paths.weights, ignore_errors=True)
        self._store.close()

    async def _check(self) -> None:
        """Look for actors whose loop stands still."""
        while True:
            await asyncio.sleep(CHECK_S)
            self._jobs.check_heartbeats()

    def _on_message(self, sender: str, message: Message, payload: Any) -> None:
        name, _, actor = sender.rpartition("/")
        job = self._jobs.known.get(name)
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

            self._tasks.start(self._desk.take(request, send), f"ctl-{request.command}")
