"""The contract check: runs any environment, ours or yours, against the rules of `sim.contract`.

    check(GuessNumber, actions=lambda observation: "8")
    check(partial(MySimulator, robot="panda"), actions=policy, max_steps=50, tolerance=1e-5)

It says which rule is broken and what was seen. It judges the rules, not the task: whether rewards
make sense is for the task's own tests.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sim.contract import Environment, StepResult
from sim.errors import SimError

SEEDS = (0, 1, 2, 1234567890123456789)


class ContractViolation(AssertionError):
    """Raised when an environment breaks a rule of `sim.contract`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the check got to see. Rules about ends were not tested where no episode ended."""

    episodes: int
    steps: int
    ended: int  # episodes that ended by themselves within max_steps


@dataclass(slots=True)
class _Trajectory:
    """One episode as it was returned (`live`) and as it looked at that moment (`frozen`)."""

    slot: int
    seed: int
    where: str
    live: list[Any] = field(default_factory=list)  # the first observation, then StepResults
    frozen: list[Any] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)  # of the first episode of its seed only

    @property
    def ended(self) -> bool:
        last = self.frozen[-1]
        return isinstance(last, StepResult) and (last.terminated or last.truncated)

    @property
    def observation(self) -> Any:
        last = self.live[-1]
        return last.observation if isinstance(last, StepResult) else last


def check(
    make_env: Callable[..., Environment],
    *,
    actions: Callable[[Any], Any],
    seeds: Sequence[int] = SEEDS,
    max_steps: int = 20,
    tolerance: float = 0.0,
) -> Checked:
    """Play episodes alone, in company and in groups, and compare them.

    make_env: called as make_env(num_slots=n) for a fresh environment; it is closed at the end
    actions: the action for an observation; asked once per seed and step, then replayed, so that it
        may draw at random
    seeds: at least two, all different
    max_steps: steps of one episode at most; with none that ends within them, ends go untested
    tolerance: absolute difference that numbers of one trajectory may show, for simulators whose
        physics depends on the batch; 0 compares bits

    ContractViolation: a rule is broken; the message names the rule, the place and the values.
    Errors of the environment itself propagate.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {list(seeds)}: give two or more, all different")
    if max_steps < 1:
        raise ValueError(f"max_steps = {max_steps}: take at least one step")
    player = _Player(actions, max_steps, tolerance)
    num_slots = len(seeds) + 1
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(contextlib.closing(make_env(num_slots=num_slots))) for _ in range(2)
        )
        alone = [player.play(first, [0], [seed], "alone")[0] for seed in seeds]
        again = [player.play(first, [0], [seed], "alone, again")[0] for seed in seeds]
        # Slots in falling order, so that an answer sorted by slot shows; and a second environment,
        # so that a draw from state outside the environment shows.
        falling = list(range(num_slots - 1, 0, -1))
        company = player.play(second, falling, list(seeds), "in company")
        action = alone[0].actions[0]
        for ended in (trajectory for trajectory in company if trajectory.ended):
            _refuses(second, ended.slot, action, "whose episode has ended")
        _refuses(second, 0, action, "that was never reset")
        rising = list(range(len(seeds)))
        moved = player.play(second, rising, list(reversed(seeds)), "in other slots")
        group = player.play(second, falling, [seeds[0]] * len(seeds), "in a group")
    everything = [*alone, *again, *company, *moved, *group]
    for trajectory in everything:
        _unchanged(trajectory)
    return Checked(
        episodes=len(everything),
        steps=sum(len(trajectory.live) - 1 for trajectory in everything),
        ended=sum(trajectory.ended for trajectory in everything),
    )


class _Player:
    """Plays batches of episodes and checks every answer, in form and against earlier ones."""

    def __init__(self, actions: Callable[[Any], Any], max_steps: int, tolerance: float) -> None:
        self._actions = actions
        self._max_steps = max_steps
        self._tolerance = tolerance
        self._first: dict[int, _Trajectory] = {}  # by seed, the first episode played with it

    def play(
        self, env: Environment, slots: list[int], seeds: list[int], where: str
    ) -> list[_Trajectory]:
        """One episode per slot, stepped together; those that end drop out of the batch."""
        observations = env.reset(slots, seeds)
        _one_each("reset", slots, observations)
        playing = []
        for slot, seed, observation in zip(slots, seeds, observations, strict=True):
            playing.append(_Trajectory(slot, seed, where))
            self._add(playing[-1], observation)
        trajectories = list(playing)
        for _ in range(self._max_steps):
            if not playing:
                break
            batch = [trajectory.slot for trajectory in playing]
            results = env.step(batch, [self._action(each) for each in playing])
            _one_each("step", batch, results)
            for trajectory, result in zip(playing, results, strict=True):
                _well_formed(trajectory, result)
                self._add(trajectory, result)
            playing = [trajectory for trajectory in playing if not trajectory.ended]
        return trajectories

    def _action(self, trajectory: _Trajectory) -> Any:
        first, index = self._first[trajectory.seed], len(trajectory.live) - 1
        if index == len(first.actions):
            first.actions.append(self._actions(trajectory.observation))
        return copy.deepcopy(first.actions[index])

    def _add(self, trajectory: _Trajectory, item: Any) -> None:
        """Compare at once: an environment that went astray answers the next step with nonsense."""
        trajectory.live.append(item)
        trajectory.frozen.append(copy.deepcopy(item))
        first = self._first.setdefault(trajectory.seed, trajectory)
        index = len(trajectory.live) - 1
        if difference := _difference(first.frozen[index], item, self._tolerance):
            raise ContractViolation(
                "same seed and same actions give the same trajectory, whatever the slot and the "
                f"company: {_place(first, index)} and {_place(trajectory, index)} differ in "
                f"{difference}"
            )


def _one_each(call: str, slots: list[int], answers: Any) -> None:
    if not isinstance(answers, list) or len(answers) != len(slots):
        seen = f"{len(answers)} in a {type(answers).__name__}" if _sized(answers) else repr(answers)
        raise ContractViolation(
            f"{call} returns a list with one entry per slot: {len(slots)} asked, {seen} returned"
        )


def _well_formed(trajectory: _Trajectory, result: Any) -> None:
    at = _place(trajectory, len(trajectory.live))
    if not isinstance(result, StepResult):
        raise ContractViolation(f"step returns StepResults: {at} it was {result!r:.200}")
    for name in ("terminated", "truncated"):
        if not isinstance(getattr(result, name), bool):
            raise ContractViolation(
                f"{name} is a bool (of Python): {at} it was {getattr(result, name)!r}"
            )
    if result.terminated and result.truncated:
        raise ContractViolation(f"terminated and truncated are never both true: {at} they were")
    if not isinstance(result.reward, float | int) or not math.isfinite(result.reward):
        raise ContractViolation(f"a reward is a finite float: {at} it was {result.reward!r}")
    for key, value in result.info.items():
        if not isinstance(key, str) or not isinstance(value, float | int | str):
            raise ContractViolation(
                f"info maps strings to numbers and strings: {at} it held {key!r}: {value!r:.200}"
            )


def _refuses(env: Environment, slot: int, action: Any, what: str) -> None:
    rule = f"step on a slot {what} raises SimError"
    try:
        results = env.step([slot], [action])
    except SimError as error:
        if str(slot) not in str(error):
            raise ContractViolation(f"{rule} that names the slot {slot}: it said {error}") from None
    except Exception as error:
        raise ContractViolation(f"{rule}: it raised {error!r:.200}") from error
    else:
        raise ContractViolation(f"{rule}: it returned {results!r:.200}")


def _unchanged(trajectory: _Trajectory) -> None:
    for index, (live, frozen) in enumerate(zip(trajectory.live, trajectory.frozen, strict=True)):
        if difference := _difference(frozen, live, 0.0):
            raise ContractViolation(
                "what is returned is never changed later (return copies, not buffers): "
                f"{_place(trajectory, index)} changed in {difference}"
            )


def _difference(left: Any, right: Any, tolerance: float, path: str = "it") -> str:
    """Where two trees first differ and how; empty when they do not."""
    if type(left) is not type(right):
        return f"{path}: {type(left).__name__} against {type(right).__name__}"
    if dataclasses.is_dataclass(left):
        pairs = [
            (f"{path}.{f.name}", getattr(left, f.name), getattr(right, f.name))
            for f in dataclasses.fields(left)
        ]
    elif isinstance(left, Mapping):
        if left.keys() != right.keys():
            return f"{path}: keys {sorted(map(str, left))} against {sorted(map(str, right))}"
        pairs = [(f"{path}[{key!r}]", left[key], right[key]) for key in left]
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"{path}: {len(left)} entries against {len(right)}"
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        return _leaf_difference(left, right, tolerance, path)
    differences = (_difference(a, b, tolerance, where) for where, a, b in pairs)
    return next(filter(None, differences), "")


def _leaf_difference(left: Any, right: Any, tolerance: float, path: str) -> str:
    if not (hasattr(left, "__array__") or isinstance(left, float | int)):
        return "" if left == right else f"{path}: {left!r:.80} against {right!r:.80}"
    a, b = (_array(value) for value in (left, right))
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{path}: {a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
    numeric = a.dtype.kind in "iufc"
    with np.errstate(invalid="ignore"):
        same = (
            np.isclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)
            if numeric and tolerance
            else (a == b) | ((a != a) & (b != b))
        )
    if np.all(same):
        return ""
    place = tuple(int(i) for i in np.argwhere(~np.atleast_1d(same))[0])
    seen = f"{np.atleast_1d(a)[place]} against {np.atleast_1d(b)[place]}"
    return f"{path}{list(place) if a.shape else ''}: {seen}"


def _array(value: Any) -> np.ndarray[Any, Any]:
    """A number, a NumPy array or a torch tensor on any device, as an array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _place(trajectory: _Trajectory, index: int) -> str:
    step = f"step {index}" if index else "the first observation"
    return f"{step} of seed {trajectory.seed} in slot {trajectory.slot} ({trajectory.where})"


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__")
