"""Where an env actor's episodes run: its own worker thread, or worker processes that each answer when they are ready.

Slots are handed out in groups. Calls of groups that wait for the same host are made together, so that a simulator
steps them as one batch; hosts do not wait for each other, so each ready part goes on at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sim.chunks import Chunked
from sim.contract import Environment
from sim.errors import WorkerLost
from sim.registry import make
from sim.workers import Worker, Workers

CALLS = (
    "render",
    "step",
    "reset",
)  # in this order: a step that waits is of an episode that a reset may be about to replace

Blocking = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Call:
    """A call of the environment that waits for its turn."""

    name: str
    slots: Sequence[int]
    values: Sequence[Any]
    results: asyncio.Future[list[Any]]

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        if not self.results.done():
            self.results.set_exception(error)
            self.results.exception()  # the first group to fail may end the others unheard


class Host:
    """Makes the calls of some slots, one after the other, those of a kind together."""

    def __init__(self, slots: range, told: Callable[[], None]) -> None:
        self.free = list(slots)
        self.busy = False
        self._slots = slots
        self._told = told  # that `busy` has changed
        self._waiting: asyncio.Queue[Call] = asyncio.Queue()

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def put(self, call: Call) -> None:
        """Have a call made; its future gets the results."""
        self._waiting.put_nowait(call)

    async def run(self) -> None:
        """Make calls as they come, until cancelled."""
        while True:
            calls = [await self._waiting.get()]
            while not self._waiting.empty():
                calls.append(self._waiting.get_nowait())
            # A group that was cancelled meanwhile has given its slots back.
            calls = [call for call in calls if not call.results.done()]
            self.busy = True
            self._told()
            for name in CALLS:
                await self._together(name, [call for call in calls if call.name == name])
            self.busy = False
            self._told()

    async def _together(self, name: str, calls: Sequence[Call]) -> None:
        calls = self._possible(name, calls)
        if not calls:
            return
        slots = [slot for call in calls for slot in call.slots]
        values = [value for call in calls for value in call.values]
        try:
            results = await self._make(name, slots, values)
        except Exception as error:  # each of the groups fails with it
            for call in calls:
                call.fail(error)
            return
        start = 0
        for call in calls:
            end = start + len(call.slots)
            if not call.results.done():
                call.results.set_result(results[start:end])
            start = end

    def _possible(self, name: str, calls: Sequence[Call]) -> Sequence[Call]:
        """Those that can be made; the others are failed."""
        return calls

    async def _make(self, name: str, slots: Sequence[int], values: Sequence[Any]) -> list[Any]:
        raise NotImplementedError


class ThreadHost(Host):
    """All slots of an environment in the actor's worker thread."""

    def __init__(
        self, slots: range, told: Callable[[], None], env: Environment, blocking: Blocking
    ) -> None:
        super().__init__(slots, told)
        self._env = env
        self._blocking = blocking

    async def _make(self, name: str, slots: Sequence[int], values: Sequence[Any]) -> list[Any]:
        of_slots = () if name == "render" else (values,)
        results: list[Any] = await self._blocking(getattr(self._env, name), slots, *of_slots)
        return results


class WorkerHost(Host):
    """The slots of one worker process."""

    def __init__(self, told: Callable[[], None], worker: Worker) -> None:
        super().__init__(worker.slots, told)
        self._worker = worker

    def _possible(self, name: str, calls: Sequence[Call]) -> Sequence[Call]:
        possible = []
        for call in calls:
            try:
                if name == "step":
                    self._worker.check_running(call.slots)
                possible.append(call)
            except WorkerLost as error:
                call.fail(error)
        return possible

    async def _make(self, name: str, slots: Sequence[int], values: Sequence[Any]) -> list[Any]:
        try:
            self._worker.ask(name, slots, values)
            return await self._answer()
        except WorkerLost:
            self._worker.begin()
            await (
                self._answer()
            )  # one that dies again while it opens is begun again by the next call
            raise

    async def _answer(self) -> list[Any]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        descriptor = self._worker.fileno()
        loop.add_reader(descriptor, ready.set)
        try:
            async with asyncio.timeout(self._worker.seconds_left):
                await ready.wait()
        except TimeoutError:
            pass  # overdue: `take` says so
        finally:
            loop.remove_reader(descriptor)
        return self._worker.take()


class Hosts:
    """All hosts of an env actor. changed: called when one begins or ends a call."""

    def __init__(self, env: Environment | Workers, hosts: Sequence[Host]) -> None:
        self.env = env
        self._hosts = hosts
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether any of them is in a call."""
        return any(host.busy for host in self._hosts)

    async def run(self) -> None:
        """Make calls until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for host in self._hosts:
                tasks.create_task(host.run())

    def take(self, count: int) -> list[int]:
        """Slots for a group: of the host that has most of them free, and of others where it has too few."""
        slots: list[int] = []
        for host in sorted(self._hosts, key=lambda host: -len(host.free)):
            wanted = count - len(slots)
            slots += host.free[:wanted]
            del host.free[:wanted]
        assert len(slots) == count
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """The group has ended."""
        for slot in slots:
            self._host(slot).free.append(slot)

    @property
    def free(self) -> list[int]:
        """Slots that no group has."""
        return [slot for host in self._hosts for slot in host.free]

    async def call(self, name: str, slots: Sequence[int], values: Sequence[Any]) -> list[Any]:
        """Have "reset" (values: seeds), "step" (actions) or "render" (None) made for slots of one group.

        WorkerLost: an episode was lost. Errors of the environment are raised as they are.
        """
        loop = asyncio.get_running_loop()
        parts: dict[Host, list[int]] = {}
        for place, slot in enumerate(slots):
            parts.setdefault(self._host(slot), []).append(place)
        calls = []
        for host, places in parts.items():
            mine, given = [slots[i] for i in places], [values[i] for i in places]
            calls.append(Call(name, mine, given, loop.create_future()))
            host.put(calls[-1])
        try:
            if len(calls) == 1:  # as a rule: a host has room for whole groups
                return await calls[0].results
            answers = await asyncio.gather(*(call.results for call in calls))
        finally:
            for call in calls:
                call.results.cancel()
        results: list[Any] = [None] * len(slots)
        for places, answer in zip(parts.values(), answers, strict=True):
            for place, result in zip(places, answer, strict=True):
                results[place] = result
        return results

    def close(self) -> None:
        """Close the environment, with its workers if it has any."""
        self.env.close()
        self._closed = True

    def end_workers(self) -> None:
        """End worker processes, unless the environment was closed; a thread's ends with the actor."""
        if isinstance(self.env, Workers) and not self._closed:
            self.close()

    def _host(self, slot: int) -> Host:
        return next(host for host in self._hosts if slot in host)


async def open_hosts(
    task: str,
    args: Mapping[str, Any],
    *,
    num_slots: int,
    workers: int,
    step_timeout_s: float,
    blocking: Blocking,
    told: Callable[[], None],
) -> Hosts:
    """Open the environment of an env actor. workers: processes; 0 is the actor's own thread (`blocking`).

    Environments of arrays take action chunks in either case.
    """
    if workers:
        pool: Workers = await blocking(
            Workers,
            task,
            args,
            num_slots=num_slots,
            num_workers=workers,
            step_timeout_s=step_timeout_s,
        )
        return Hosts(pool, [WorkerHost(told, part) for part in pool.parts])
    env: Any = await blocking(make, task, num_slots=num_slots, args=args)
    if hasattr(env, "action_space"):
        env = Chunked(env)
    return Hosts(env, [ThreadHost(range(num_slots), told, env, blocking)])
