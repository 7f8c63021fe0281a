"""What happened to jobs: told to followers at once, and kept where it is worth keeping."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from flowd.paths import StatePaths
from flowd.store import Store, noting

SUBSCRIBER_BOUND = 10_000
# Told, not kept: they come with every step, and metrics and ledger have them. What is kept is rare, so
# that writing it on the loop is no matter.
PASSING = frozenset({"actor", "step", "warmup", "commit"})


class EventLog:
    """One per flowd. What is kept is kept twice: in the store for all jobs, in events.jsonl with the run."""

    def __init__(self, paths: StatePaths, store: Store) -> None:
        self._paths = paths
        self._store = store
        self._subscribers: dict[asyncio.Queue[dict[str, Any]], str | None] = {}

    def emit(self, job: str, kind: str, data: dict[str, Any]) -> None:
        """Tell followers, and keep what is worth keeping."""
        now = time.time()
        if kind not in PASSING:
            with noting():
                self._store.add_event(now, kind, job=job, actor=data.get("actor"), data=data)
            line = json.dumps({"time": round(now, 3), "kind": kind, **data})
            with contextlib.suppress(OSError), self._paths.run(job).events.open("a") as file:
                file.write(line + "\n")
        body = {"metrics": data} if kind == "step" else data
        update = {"event": kind, "job": job, **body}
        for queue, wanted in self._subscribers.items():
            if wanted in (None, job) and not queue.full():
                queue.put_nowait(update)

    def subscribe(self, job: str | None) -> AsyncIterator[dict[str, Any]]:
        """Updates from this call on; None is every job."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(SUBSCRIBER_BOUND)
        self._subscribers[queue] = job
        return _Subscription(queue, lambda: self._subscribers.pop(queue, None))

    def after(self, event_id: int, job: str | None, limit: int) -> list[dict[str, Any]]:
        """Kept events with a higher id, oldest first."""
        rows = self._store.events(after=event_id, job=job, limit=limit)
        return [
            {"id": row.id, "time": row.time, "job": row.job, "kind": row.kind, **row.data}
            for row in rows
        ]


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
