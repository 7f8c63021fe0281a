"""The life that every actor shares, whatever process or loop it runs in.

    setup()   builds what the actor computes with; introductions come after it
    run()     works until it is cancelled; for a conductor, until the job is over
    park()    gives up the device when a lease is revoked; returns the bytes that stay on it
    leave()   hands back what is in flight; after `Stop`, before the process ends

An actor meets its peers only through `self.endpoint` (messages) and `self.router` (channels).
"""

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from actors.job_config import JobConfig
from actors.json_lines import as_json
from actors.lease import Lease
from actors.spans import SpanWriter
from channels.channel import ChannelRouter
from channels.endpoint import Endpoint
from channels.lifecycle import FLOWD, ActorSpec, FirstOutput, Introduce, JobEvent
from channels.messages import Message
from channels.work import InCall

T = TypeVar("T")


class TimeShares:
    """How an actor's life divides: it is in one state at a time, "work" or "wait_<what>"."""

    def __init__(self, state: str) -> None:
        self.state = state
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}

    def enter(self, state: str) -> None:
        """Count the time since the last change for the state that ends now."""
        now = time.monotonic()
        self._seconds[self.state] = self._seconds.get(self.state, 0.0) + now - self._since
        self.state, self._since = state, now

    @contextlib.contextmanager
    def measure(self, state: str) -> Iterator[None]:
        """Be in `state` for the block, then again in the state of before."""
        before = self.state
        self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Seconds by state, up to now."""
        self.enter(self.state)
        return {state: round(value, 4) for state, value in self._seconds.items()}

    @property
    def waits_for(self) -> str:
        """What is waited for; empty while working."""
        return self.state.removeprefix("wait_") if self.state.startswith("wait_") else ""


class Actor:
    """Base of all kinds."""

    def __init__(
        self,
        spec: ActorSpec,
        endpoint: Endpoint,
        router: ChannelRouter,
        lease: Lease,
        *,
        inline: bool,
    ) -> None:
        self.spec = spec
        self.config = msgspec.msgpack.decode(spec.config, type=JobConfig)
        self.endpoint = endpoint
        self.router = router
        self.lease = lease
        self.inline = inline
        self.run_dir = Path(spec.run_dir)
        self.log = logging.getLogger(f"{spec.job}.{spec.actor}")
        self.time = TimeShares("setup")
        self.counters: dict[str, float] = {}
        self.spans = SpanWriter(self.run_dir / "spans.jsonl", spec.actor)
        self.peers: dict[str, Introduce] = {}
        self._delivered = False
        self._call: tuple[str, float, int] | None = None  # name, begin (monotonic), thread
        self._worker = (
            None if inline else ThreadPoolExecutor(1, thread_name_prefix=f"{spec.actor}-worker")
        )

    # What a kind fills in.

    async def setup(self) -> None:
        """Build what the actor computes with."""

    async def run(self) -> None:
        """Work until cancelled."""
        await asyncio.Event().wait()

    async def park(self, offload: bool) -> int:
        """Give up the device; returns the bytes that stay resident on it."""
        return 0

    async def leave(self) -> None:
        """Hand back what is in flight."""

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        """A message that is neither a channel's nor flowd's business."""

    def on_peer(self, peer: Introduce) -> None:
        """A peer is there and connected."""

    def on_peer_lost(self, peer: Introduce) -> None:
        """A peer is gone."""

    # What kinds use.

    async def blocking(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run blocking work off the loop, one call at a time; inline on the loop, where breakpoint() works."""
        if self._worker is None:
            await asyncio.sleep(
                0
            )  # the other actors of the loop get their turn between two computations
            return function(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._worker, self._noted, partial(function, *args, **kwargs)
        )

    def _noted(self, work: "partial[T]") -> T:
        name = getattr(work.func, "__qualname__", type(work.func).__qualname__)
        self._call = (name, time.monotonic(), threading.get_ident())
        try:
            return work()
        finally:
            self._call = None

    def in_call(self) -> InCall:
        """The blocking call that the worker thread is in, and the line of Python that it has got to."""
        call = self._call
        if call is None:
            return InCall(call="", seconds=0.0)
        name, began, thread = call
        frame = sys._current_frames().get(thread)
        place = f" at {frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
        return InCall(call=name + place, seconds=time.monotonic() - began)

    async def compute(self, name: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Blocking work on the leased devices: refused without the lease, counted as work, shown in the trace."""
        self.lease.check()
        begin = time.time()
        with self.time.measure("work"):
            result = await self.blocking(function, *args, **kwargs)
        self.lease.check()
        self.spans.add(name, begin, time.time() - begin)
        return result

    def report(self) -> dict[str, Any]:
        """What a heartbeat tells: time shares, counters, and what is waited for."""
        return {
            "time": self.time.seconds(),
            "waits_for": self.time.waits_for,
            "counters": self.counters,
        }

    def event(self, kind: str, **data: Any) -> None:
        """Tell flowd, and through it whoever follows the job."""
        self.endpoint.send(FLOWD, JobEvent(job=self.spec.job, kind=kind, data=as_json(data)))

    def delivered(self) -> None:
        """A piece of work was delivered; the first one is reported."""
        if not self._delivered:
            self._delivered = True
            self.endpoint.send(
                FLOWD,
                FirstOutput(actor=self.spec.actor, job=self.spec.job, epoch=self.spec.epoch),
            )

    def peers_of(self, kind: str) -> list[Introduce]:
        """The connected peers of a kind."""
        return [peer for peer in self.peers.values() if peer.kind == kind]

    def introduced(self, peer: Introduce) -> None:
        """Connect to a peer; a newer epoch of a known one replaces it."""
        known = self.peers.get(peer.peer)
        if known is not None:
            if known.epoch >= peer.epoch:
                return
            self.forgotten(known.peer, known.epoch)
        self.peers[peer.peer] = peer
        self.endpoint.connect(peer.peer, peer.address)
        self.on_peer(peer)

    def forgotten(self, name: str, epoch: int) -> None:
        """Drop a peer, unless a newer epoch of it is already known."""
        known = self.peers.get(name)
        if known is None or known.epoch > epoch:
            return
        del self.peers[name]
        self.on_peer_lost(known)
        self.endpoint.disconnect(name)

    def close(self) -> None:
        """Free the worker and the files."""
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
        self.spans.close()
