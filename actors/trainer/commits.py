"""A rank's commits, written beside the training: at most one is in flight, in a thread of its own."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

from actors.conductor.manifest import Manifest
from actors.trainer.checkpoint import CheckpointWriter


class Commits:
    """The loop's side of a `CheckpointWriter`.

    wait: let `close` wait for what is being written; else it is left to end with the process
    """

    def __init__(self, writer: CheckpointWriter, *, wait: bool) -> None:
        self.writer = writer
        self._wait = wait
        self._in_flight: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commits")

    @property
    def in_flight(self) -> bool:
        """Whether a commit is being written."""
        return self._in_flight is not None and not self._in_flight.done()

    def start(self, tasks: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        """Begin with what `writer` has staged. tasks: of the actor's life, so that a failure ends it."""
        assert not self.in_flight
        self._in_flight = tasks.create_task(work, name="commit")

    async def settled(self) -> None:
        """Return once none is in flight. Before the next is staged: its copy takes the place of the last one's."""
        if self._in_flight is not None:
            await asyncio.wait([self._in_flight])

    async def write(self) -> None:
        """Put what was staged on disk, together with the other ranks."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.writer.write)

    async def commit(self, manifest: Manifest) -> None:
        """Make it count."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.writer.commit, manifest)

    def close(self) -> None:
        """No further commit. One that is in flight counts only if its manifest is being written already."""
        self._thread.shutdown(wait=self._wait, cancel_futures=True)
