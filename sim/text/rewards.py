"""Rewards by import path: what a reply earns, by functions of the user's own or of ours, several with weights.

    def polite(reply: str, row: Mapping[str, Any]) -> float:
        return float("please" in reply)

A reward is a function (reply, row, **args), sync or async, or a class made once with `args`, whose objects are called
as (reply, row) and, where they have `close`, closed. `row` holds the values that the source's `fields` name.
It returns a number, or a Score that also says something for the logs.

Each call has a time limit, in a thread of its own: a call that overruns fails the actor, whose end takes the thread.
"""

import asyncio
import inspect
import math
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from sim.errors import BadTaskData, SimError
from sim.text.tables import from_table

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OURS = {
    "exact": "sim.text.rewards:exact",
    "matches": "sim.text.rewards:matches",
    "number": "sim.text.number_reward:Number",
    "python_tests": "sim.text.python_tests:PythonTests",
}
MAX_AT_A_TIME = 64  # calls of an async reward, which wait for somebody else's machine


class RewardError(SimError):
    """Raised when a reward cannot be computed: it raised, overran its time, or returned no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reply earned. info: for the logs, as in StepResult; its keys get the reward's name in front."""

    value: float
    info: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """One reward of a task.

    function: "module:name", or the name of one of ours
    name: in logs; the function's when empty
    weight: what its value is multiplied with before the sum; 0 only logs it
    timeout_s: of one call
    args: its keyword arguments
    """

    function: str
    name: str = ""
    weight: float = 1.0
    timeout_s: float = 60.0
    args: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, table: Any, where: str) -> "RewardSettings":
        """From the job's table; arguments of our own rewards are checked too. ValueError: a key breaks a rule."""
        settings = from_table(cls, table, where)
        if settings.function not in OURS and not IMPORT_PATH.fullmatch(settings.function):
            raise ValueError(
                f'{where}.function = "{settings.function}": give an import path, module:function, '
                f"or one of {', '.join(OURS)}"
            )
        if not math.isfinite(settings.weight):
            raise ValueError(f"{where}.weight = {settings.weight}: it must be a finite number")
        if not settings.timeout_s > 0:
            raise ValueError(f"{where}.timeout_s = {settings.timeout_s:g}: it must be more than 0")
        if settings.function in OURS:
            find(settings)
        return settings

    @property
    def log_name(self) -> str:
        return self.name or self.function.rpartition(":")[2]


def find(settings: RewardSettings) -> Any:
    """The function or class of a reward. ValueError: it is not there, or does not take the arguments."""
    module, _, name = OURS.get(settings.function, settings.function).partition(":")
    try:
        found = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(
            f'reward "{settings.function}": there is no module {module}: its folder must be on '
            "PYTHONPATH where the env actors run"
        ) from error
    except AttributeError as error:
        raise ValueError(f'reward "{settings.function}": module {module} has no {name}') from error
    given = () if inspect.isclass(found) else ("reply", "row")
    try:
        inspect.signature(found).bind(*given, **settings.args)
    except TypeError as error:
        raise ValueError(
            f'reward "{settings.function}" with args {settings.args}: {error}'
        ) from None
    return found


@dataclass(frozen=True, slots=True)
class _Call:
    """One reward of one reply."""

    reward: int
    item: int
    function: Callable[[], Any]
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What is to be scored. where: the row's place, for errors."""

    text: str
    row: Mapping[str, Any]
    where: str


class Rewards:
    """The rewards of a task, loaded and ready.

    workers: calls of sync rewards at a time

    ValueError, or what a reward's own class raises: one cannot be loaded.
    """

    def __init__(self, settings: Sequence[RewardSettings], *, workers: int) -> None:
        self._settings = settings
        self._workers = workers
        self._rewards: list[Any] = []
        for each in settings:
            found = find(each)
            made = found(**each.args) if inspect.isclass(found) else partial(found, **each.args)
            self._rewards.append(made)

    def score(self, replies: Sequence[Reply]) -> list[list[Score]]:
        """The scores of each reply, one per reward. RewardError says which function failed on which row."""
        scores: list[list[Any]] = [[None] * len(self._settings) for _ in replies]
        sync: list[_Call] = []
        later: list[_Call] = []
        for number, (settings, reward) in enumerate(
            zip(self._settings, self._rewards, strict=True)
        ):
            called = reward.func if isinstance(reward, partial) else reward.__call__
            calls = later if inspect.iscoroutinefunction(called) else sync
            calls += [
                _Call(number, item, partial(reward, reply.text, reply.row), settings.timeout_s)
                for item, reply in enumerate(replies)
            ]
        for call, outcome in [*_in_threads(sync, self._workers), *_in_a_loop(later)]:
            place = self._place(call, replies)
            if isinstance(outcome, _Overran):
                raise RewardError(
                    f"{place}: it took longer than timeout_s = {call.timeout_s:g}; make it faster, "
                    "or raise its timeout_s"
                )
            if isinstance(outcome, BaseException):
                raise RewardError(f"{place}: {type(outcome).__name__}: {outcome}") from outcome
            scores[call.item][call.reward] = _score(outcome, place)
        return scores

    def close(self) -> None:
        """Close those that hold something."""
        for reward in self._rewards:
            if hasattr(reward, "close"):
                reward.close()

    def _place(self, call: _Call, replies: Sequence[Reply]) -> str:
        settings = self._settings[call.reward]
        return f'reward "{settings.log_name}" ({settings.function}) on {replies[call.item].where}'


class _Overran:
    """Stands for the outcome of a call that was given up."""


def _score(outcome: Any, place: str) -> Score:
    score = outcome if isinstance(outcome, Score) else Score(value=outcome)
    value = score.value
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RewardError(
            f"{place}: it must return a finite number or a Score, not {outcome!r:.80}"
        )
    return Score(value=float(value), info=score.info)


class _Worker(threading.Thread):
    """Makes one waiting call after the other. Daemonic: a call that never ends must not hold up the process."""

    def __init__(
        self, waiting: deque[_Call], outcomes: "queue.SimpleQueue[tuple[_Call, Any]]"
    ) -> None:
        super().__init__(name="reward", daemon=True)
        self._waiting = waiting
        self._outcomes = outcomes
        self.at: tuple[_Call, float] | None = None  # the call, and when it has to be over

    def run(self) -> None:
        while True:
            try:
                call = self._waiting.popleft()
            except IndexError:
                return
            self.at = (call, time.monotonic() + call.timeout_s)
            try:
                outcome = call.function()
            except BaseException as error:
                outcome = error
            self.at = None
            self._outcomes.put((call, outcome))


def _in_threads(calls: Sequence[_Call], workers: int) -> list[tuple[_Call, Any]]:
    """Make the calls, so many at a time; ends with the first that overruns."""
    waiting = deque(calls)
    queued: queue.SimpleQueue[tuple[_Call, Any]] = queue.SimpleQueue()
    threads = [_Worker(waiting, queued) for _ in range(min(workers, len(calls)))]
    for thread in threads:
        thread.start()
    shortest = min((call.timeout_s for call in calls), default=0.0)
    outcomes: list[tuple[_Call, Any]] = []
    while len(outcomes) < len(calls):
        now = time.monotonic()
        running = [at for thread in threads if (at := thread.at)]
        overrun = [call for call, end in running if end <= now]
        if overrun and queued.empty():
            waiting.clear()
            return [*outcomes, (overrun[0], _Overran())]
        try:
            # Without a running call one is about to begin or to be told: no end is nearer than a whole call's.
            end = min((end for _, end in running), default=now + shortest)
            outcomes.append(queued.get(timeout=max(end - now, 0.0)))
        except queue.Empty:
            continue
    return outcomes


def _in_a_loop(calls: Sequence[_Call]) -> list[tuple[_Call, Any]]:
    """Await the calls side by side in an event loop of their own; the actor's is not ours to hold up."""
    if not calls:
        return []

    async def make_all() -> list[Any]:
        room = asyncio.Semaphore(MAX_AT_A_TIME)

        async def make(call: _Call) -> Any:
            async with room:
                try:
                    async with asyncio.timeout(call.timeout_s) as limit:
                        return await call.function()
                except TimeoutError as error:
                    return _Overran() if limit.expired() else error
                except Exception as error:
                    return error

        return await asyncio.gather(*map(make, calls))

    return list(zip(calls, asyncio.run(make_all()), strict=True))


def exact(reply: str, row: Mapping[str, Any], *, field: str = "answer") -> float:
    """1 where the reply is the field's text, surrounding white space aside."""
    return float(reply.strip() == str(_field(row, field)).strip())


def matches(reply: str, row: Mapping[str, Any], *, pattern: str) -> float:
    """1 where a part of the reply matches the regular expression (dot matches line ends too), as for a format."""
    return float(re.search(pattern, reply, re.DOTALL) is not None)


def _field(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise BadTaskData(
            f'the row has no "{field}" but {sorted(row)}: name it in the fields of the source'
        )
    return row[field]
