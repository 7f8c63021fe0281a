"""What inference actors say of the groups of a step, with the policy and critic that the step begins with.

A group is asked about as soon as it is admitted and that version is in the node's host copy, so all of a step's groups
are read while others are still being sampled, or trained on; the trainer collects before it computes on them.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.episodes import Group, PolicyReading, ReadingRequest
from channels.channel import Producer

Key = tuple[int, int]  # group, attempt
Answer = tuple[PolicyReading, ...]  # one a segment


class Readings:
    """Asks and keeps the answers of the current step.

    pool: the groups that are here    spawn: starts a task that the actor owns
    """

    def __init__(
        self,
        producer: Producer,
        pool: Mapping[Key, Group],
        spawn: Callable[[Coroutine[Any, Any, Answer]], asyncio.Task[Answer]],
    ) -> None:
        self.producer = producer
        self._pool = pool
        self._spawn = spawn
        self._version: tuple[int, int] | None = None  # run attempt, version: the newest that is out
        self._due: dict[int, list[Key]] = {}  # by step: admitted before their version was out
        self._admitted: dict[Key, int] = {}  # the step of each, of this one and later ones
        self._asked: dict[Key, asyncio.Task[Answer]] = {}

    def admit(self, step: int, key: Key) -> None:
        """A group of the pool will be trained by a step. A conductor may say so again, even when it has been."""
        trained = self._version is not None and step < self._version[1]
        if not trained and key not in self._admitted:
            self._admitted[key] = step
            self._due.setdefault(step, []).append(key)
            self._ask()

    def published(self, run_attempt: int, version: int) -> None:
        """The version that the step of its number begins with is in the host copy."""
        self._version = (run_attempt, version)
        self._admitted = {key: step for key, step in self._admitted.items() if step >= version}
        self._ask()

    def reset(self) -> None:
        """The run is broken off: nobody waits for what is asked."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked.clear()
        self._admitted.clear()
        self._due.clear()
        self._version = None

    async def collect(self, groups: Sequence[Group]) -> list[Group]:
        """These groups of the current step, with what was answered."""
        return [await self._answered(group) for group in groups]

    def _ask(self) -> None:
        if self._version is None:
            return
        run_attempt, version = self._version
        for key in self._due.pop(version, ()):
            group = self._pool[key]
            request = ReadingRequest(group=group, run_attempt=run_attempt, version=version)
            self._asked[key] = self._spawn(self.producer.call(request))

    async def _answered(self, group: Group) -> Group:
        readings = await self._asked.pop((group.group, group.attempt))
        segments = zip(group.segments, readings, strict=True)
        return replace(
            group, segments=tuple(replace(s, reading=reading) for s, reading in segments)
        )
