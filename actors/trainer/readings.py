"""What inference actors say of the groups of a step, with the policy and critic that the step begins with.

A group is asked about when it is admitted, so it is read while others of its step are still being sampled; the trainer
collects before it computes on it. Requests name the version, which is in the node's host copy before a step begins.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from actors.episodes import Group, PolicyReading, ReadingRequest
from channels.channel import Producer


class Readings:
    """The requests of the current step."""

    def __init__(self, producer: Producer) -> None:
        self.producer = producer
        self._asked: dict[tuple[int, int], asyncio.Task[tuple[PolicyReading, ...]]] = {}

    def ask(
        self, tasks: asyncio.TaskGroup, group: Group, *, run_attempt: int, version: int
    ) -> None:
        """Ask about a group; a request whose inference actor dies goes to another one. tasks: own the wait"""
        request = ReadingRequest(group=group, run_attempt=run_attempt, version=version)
        self._asked[group.group, group.attempt] = tasks.create_task(
            self.producer.call(request), name=f"reading-{group.group}"
        )

    async def collect(self, groups: Sequence[Group]) -> list[Group]:
        """These groups, which were asked about, with what was answered."""
        return [await self._answered(group) for group in groups]

    def withdraw(self) -> None:
        """The step is not trained: nobody waits for what is still asked."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked.clear()

    async def _answered(self, group: Group) -> Group:
        readings = await self._asked.pop((group.group, group.attempt))
        segments = zip(group.segments, readings, strict=True)
        return replace(
            group, segments=tuple(replace(s, reading=reading) for s, reading in segments)
        )
