"""A daemon without actors behind a real control socket: what the tests of commands talk to."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import zmq

from channels.control import CtlRequest
from channels.errors import PeerLost
from channels.messages import decode, encode
from flowd import lockfile
from flowd.control import ControlDesk
from flowd.errors import RequestError, UnknownJob
from flowd.paths import StatePaths


def job_status(name: str = "toy", **changes: Any) -> dict[str, Any]:
    """A job's status as the daemon gives it."""
    actor = {
        "name": "rollout-0",
        "kind": "rollout",
        "pid": 11,
        "node": "here",
        "devices": ["cpu:0"],
        "state": "ready",
        "restarts": 0,
        "waits_for": "weights",
        "time": {"work": 3.0, "wait_weights": 1.0},
    }
    return {
        "name": name,
        "state": "running",
        "step": 2,
        "steps": 4,
        "policy_version": 2,
        "reward_mean": 0.5,
        "staleness_max": 1,
        "tokens_per_s": 1234.0,
        "attempt": 0,
        "reason": "",
        "error": None,
        "actors": [actor],
        **changes,
    }


class FakeDaemon:
    """Answers from what a test put in; keeps what it was asked."""

    def __init__(self) -> None:
        self.statuses: dict[str, dict[str, Any]] = {"toy": job_status()}
        self.updates: list[dict[str, Any]] = []  # what subscribers get, then the end
        self.end_status: dict[str, Any] | None = None  # of "toy" once the updates are out
        self.event_rows: list[dict[str, Any]] = []
        self.edges: list[dict[str, Any]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.hold = threading.Event()  # scale waits for it
        self.hold.set()
        self.scaling = threading.Event()  # set once scale was called
        self.stop_requested = False

    async def submit(self, name: str, config: Any, toml_text: str) -> dict[str, Any]:
        if name in self.statuses and name != "toy":
            raise RequestError(f'job "{name}" exists already')
        self.asked.append(("submit", name, config, toml_text))
        return job_status(name, state="starting", step=0)

    def jobs(self) -> list[dict[str, Any]]:
        return list(self.statuses.values())

    def status(self, job: str) -> dict[str, Any]:
        if job not in self.statuses:
            raise UnknownJob(f'no job "{job}"')
        return self.statuses[job]

    def channels(self, job: str) -> list[dict[str, Any]]:
        self.asked.append(("channels", job))
        return self.edges

    async def cancel(self, job: str) -> dict[str, Any]:
        return {**self.status(job), "state": "cancelled"}

    async def resume(self, job: str, toml_text: str | None = None) -> dict[str, Any]:
        return {**self.status(job), "state": "starting"}

    async def scale(
        self, job: str, stage: str, change: str, from_stage: str | None
    ) -> dict[str, Any]:
        self.asked.append(("scale", job, stage, change, from_stage))
        self.scaling.set()
        await asyncio.to_thread(self.hold.wait, 30)
        return {
            "seconds_total": 0.51,
            "seconds_drain": 0.1,
            "seconds_ready": 0.3,
            "seconds_first_output": None,
            "started": ["rollout-2"],
            "stopped": [],
        }

    def devices(self) -> list[dict[str, Any]]:
        common = {"kind": "cpu", "memory_bytes": 2**30, "name": "virtual", "slot": 0, "uuid": ""}
        return [
            {
                "id": f"cpu:{i}",
                "index": i,
                **common,
                "holders": ["other/trainer-0"] if i == 0 else [],
            }
            for i in range(5)
        ]

    def nodes(self) -> list[dict[str, Any]]:
        return [{"name": "here", "state": "up", "devices": 5}]

    def events(self, job: str | None, after_id: int, limit: int) -> list[dict[str, Any]]:
        return [row for row in self.event_rows if row["id"] > after_id][:limit]

    def subscribe(self, job: str | None) -> AsyncIterator[dict[str, Any]]:
        async def updates() -> AsyncIterator[dict[str, Any]]:
            for update in self.updates:
                if self.end_status is not None and update is self.updates[-1]:
                    self.statuses["toy"] = self.end_status
                yield update

        return updates()

    def request_shutdown(self) -> None:
        self.stop_requested = True


class Server:
    """Holds the lock of a state directory and serves a FakeDaemon on its control socket, in a thread."""

    def __init__(self, root: Path, daemon: FakeDaemon) -> None:
        self.daemon = daemon
        self.paths = StatePaths(root)
        self.silent = False  # takes requests and answers none
        self.lock = lockfile.acquire(self.paths.lock)
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(self.paths.control_address)
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.lock.announce(self.paths.control_address)

    def close(self) -> None:
        self.lock.release()
        self.daemon.hold.set()
        self._stop.send(b"")
        self._thread.join()
        self._stop.close()
        self._context.term()

    def _serve(self) -> None:
        stopped = self._context.socket(zmq.PAIR)
        stopped.connect("inproc://stop")
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        with asyncio.Runner() as runner:
            desk = ControlDesk(self.daemon)
            while True:
                ready = dict(poller.poll())
                if stopped in ready:
                    break
                identity, body = self._router.recv_multipart()
                if not self.silent:
                    request = decode(body)
                    assert isinstance(request, CtlRequest)
                    runner.run(desk.take(request, self._sender(identity)))
        for socket in (self._router, stopped):
            socket.close(linger=0)

    def _sender(self, identity: bytes) -> Any:
        async def send(message: Any) -> None:
            try:
                self._router.send_multipart([identity, encode(message)])
            except zmq.ZMQError as error:
                raise PeerLost("left") from error

        return send
