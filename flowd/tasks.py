"""Tasks with an owner: kept until they end, logged when they fail, cancelled together."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class Tasks:
    """The running tasks of one owner, which is named in the log when one of them fails."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        """Run `work` beside whatever else runs."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def named(self, prefix: str) -> list["asyncio.Task[Any]"]:
        """Those whose names begin so."""
        return [task for task in self._running if task.get_name().startswith(prefix)]

    def cancel(self) -> None:
        """Cancel all but the one that calls."""
        current = asyncio.current_task()
        for task in [task for task in self._running if task is not current]:
            task.cancel()

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._running.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s task=%s failed", self._owner, task.get_name(), exc_info=task.exception())
