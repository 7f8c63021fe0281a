"""The contract check: runs any environment, ours or yours, against the rules of `sim.contract`.

    check(GuessNumber, actions=lambda observation: "8")
    check(partial(MySimulator, robot="panda"), uncut=partial(MySimulator, robot="panda", max_steps=60), tolerance=1e-5)

It says which rule is broken and what was seen. It judges the rules, not the task: whether rewards
make sense is for the task's own tests.
"""

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sim.contract import Environment, StepResult
from sim.differences import difference, spoil
from sim.errors import SimError
from sim.spaces import observation_complaint

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
    def steps(self) -> int:
        """Steps taken; at the first observation 0."""
        return len(self.live) - 1

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
    actions: Callable[[Any], Any] | None = None,
    seeds: Sequence[int] = SEEDS,
    max_steps: int = 20,
    tolerance: float = 0.0,
    uncut: Callable[..., Environment] | None = None,
) -> Checked:
    """Play episodes alone, in company, in groups and one after another, and compare them.

    make_env: called as make_env(num_slots=n) for a fresh environment; it is closed at the end
    actions: the action for an observation; asked once per seed and step, then replayed, so that it
        may draw at random. None draws from the environment's action_space
    seeds: at least two, all different
    max_steps: steps of one episode at most; with none that ends within them, ends go untested
    tolerance: absolute difference that numbers of one trajectory may show, for simulators whose
        physics depends on the batch; 0 compares bits
    uncut: as make_env, with a longer step limit: where an episode is truncated, the longer one must
        show the same observation, which shows that it is the true last one

    ContractViolation: a rule is broken; the message names the rule, the place and the values.
    Errors of the environment itself propagate.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds = {list(seeds)}: give two or more, all different")
    if max_steps < 1:
        raise ValueError(f"max_steps = {max_steps}: take at least one step")
    num_slots = len(seeds) + 1
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(contextlib.closing(make_env(num_slots=num_slots))) for _ in range(2)
        )
        player = _Player(actions or _random_actions(first), max_steps, tolerance)
        alone = [player.play(first, [0], [seed], "alone")[0] for seed in seeds]
        again = [
            player.play(first, [0], [seed], "alone, again", disturbed=True)[0] for seed in seeds
        ]
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
        late = player.play(second, falling, list(seeds), "one after another", staggered=True)
        group = player.play(second, falling, [seeds[0]] * len(seeds), "in a group")
        if uncut is not None:
            longer = stack.enter_context(contextlib.closing(uncut(num_slots=1)))
            for trajectory in alone:
                player.compare_uncut(longer, trajectory)
    for trajectory in (*alone, *company, *moved, *late, *group):
        _unchanged(trajectory)
    everything = [*alone, *again, *company, *moved, *late, *group]
    return Checked(
        episodes=len(everything),
        steps=sum(len(trajectory.live) - 1 for trajectory in everything),
        ended=sum(trajectory.ended for trajectory in everything),
    )


def _random_actions(env: Any) -> Callable[[Any], Any]:
    if not hasattr(env, "action_space"):
        raise ValueError("the environment has no action_space to draw from: give actions")
    draw = np.random.default_rng(0)
    return lambda observation: env.action_space.sample(draw)


class _Player:
    """Plays batches of episodes and checks every answer, in form and against earlier ones."""

    def __init__(self, actions: Callable[[Any], Any], max_steps: int, tolerance: float) -> None:
        self._actions = actions
        self._max_steps = max_steps
        self._tolerance = tolerance
        self._first: dict[int, _Trajectory] = {}  # by seed, the first episode played with it

    def play(
        self,
        env: Environment,
        slots: list[int],
        seeds: list[int],
        where: str,
        *,
        staggered: bool = False,
        disturbed: bool = False,
    ) -> list[_Trajectory]:
        """One episode per slot, stepped together; those that end drop out of the batch.

        staggered: each begins a step after the one before, while those go on
        disturbed: after every step pictures are taken, and what was returned is written over
        """
        trajectories = [_Trajectory(*each, where) for each in zip(slots, seeds, strict=True)]
        waiting, playing = deque(trajectories), list[_Trajectory]()
        together = 1 if staggered else len(trajectories)
        while waiting or playing:
            starting = [waiting.popleft() for _ in range(min(together, len(waiting)))]
            if starting:
                self._reset(env, starting, disturbed)
            playing += starting
            self._step(env, playing, disturbed)
            playing = [each for each in playing if not each.ended and each.steps < self._max_steps]
        return trajectories

    def _reset(self, env: Environment, starting: list[_Trajectory], disturbed: bool) -> None:
        slots = [trajectory.slot for trajectory in starting]
        observations = env.reset(slots, [trajectory.seed for trajectory in starting])
        _one_each("reset", slots, observations)
        for trajectory, observation in zip(starting, observations, strict=True):
            self._add(env, trajectory, observation, disturbed)

    def _step(self, env: Environment, playing: list[_Trajectory], disturbed: bool) -> None:
        slots = [trajectory.slot for trajectory in playing]
        actions = [self._action(trajectory) for trajectory in playing]
        results = env.step(slots, actions)
        _one_each("step", slots, results)
        for trajectory, action, result in zip(playing, actions, results, strict=True):
            if difference(self._action(trajectory), action, 0.0):
                at = _place(trajectory, len(trajectory.live))
                raise ContractViolation(
                    f"an action is the policy's and stays as it is: {at} it was changed"
                )
            _well_formed(trajectory, result)
            self._add(env, trajectory, result, disturbed)

    def _action(self, trajectory: _Trajectory) -> Any:
        first, index = self._first[trajectory.seed], trajectory.steps
        if index == len(first.actions):
            first.actions.append(self._actions(trajectory.observation))
        return copy.deepcopy(first.actions[index])

    def _add(self, env: Any, trajectory: _Trajectory, item: Any, disturbed: bool) -> None:
        """Compare at once: an environment that went astray answers the next step with nonsense."""
        trajectory.live.append(item)
        trajectory.frozen.append(copy.deepcopy(item))
        first = self._first.setdefault(trajectory.seed, trajectory)
        index = trajectory.steps
        if found := difference(first.frozen[index], item, self._tolerance):
            raise ContractViolation(
                "same seed and same actions give the same trajectory, whatever the slot and the "
                f"company: {_place(first, index)} and {_place(trajectory, index)} differ in "
                f"{found}"
            )
        if hasattr(env, "observation_space"):
            complaint = observation_complaint(env.observation_space, trajectory.observation)
            if complaint:
                at = _place(trajectory, index)
                raise ContractViolation(
                    f"observations lie in observation_space: at {at} {complaint}"
                )
        if disturbed:
            _render(env, trajectory)
            spoil(item)

    def compare_uncut(self, env: Environment, trajectory: _Trajectory) -> None:
        """Play a truncated episode where it is not cut."""
        last = trajectory.frozen[-1]
        if not isinstance(last, StepResult) or not last.truncated:
            return
        env.reset([0], [trajectory.seed])
        for action in trajectory.actions[: trajectory.steps]:
            (result,) = env.step([0], [copy.deepcopy(action)])
        if found := difference(last.observation, result.observation, self._tolerance):
            raise ContractViolation(
                "the observation of a truncation is the true last one: "
                f"{_place(trajectory, trajectory.steps)} and the same step of a longer episode differ in {found}"
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
    _well_formed_chunk(result, at)
    _well_formed_success(trajectory, result, at)


def _well_formed_chunk(result: StepResult, at: str) -> None:
    rewards = result.step_rewards
    if rewards is None:
        return
    form = isinstance(rewards, np.ndarray) and rewards.dtype == np.float32 and rewards.ndim == 1
    if not form or not len(rewards) or not math.isclose(result.reward, rewards.sum(), abs_tol=1e-3):
        raise ContractViolation(
            f"step_rewards are float32 [steps] with the sum `reward`: {at} they were {rewards!r:.200} "
            f"beside {result.reward}"
        )


def _well_formed_success(trajectory: _Trajectory, result: StepResult, at: str) -> None:
    once: Any
    now: Any
    once, now = (result.info.get(name) for name in ("success_once", "success_at_end"))
    if once is None and now is None:
        return
    before = trajectory.frozen[-1]
    earlier: Any = before.info.get("success_once", 0.0) if isinstance(before, StepResult) else 0.0
    if once not in (0.0, 1.0) or now not in (0.0, 1.0) or once < max(now, earlier):
        raise ContractViolation(
            "info has success_once and success_at_end, 0.0 or 1.0, and success_once stays at 1.0: "
            f"{at} they were {once!r} and {now!r}, success_once {earlier!r} before"
        )


def _render(env: Any, trajectory: _Trajectory) -> None:
    """Take a picture where there is one; what the episode does afterwards shows whether it is changed by it."""
    if not hasattr(env, "render"):
        return
    try:
        (picture,) = env.render([trajectory.slot])
    except SimError:  # it has none
        return
    if getattr(picture, "dtype", None) != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ContractViolation(f"render returns uint8 [H, W, 3] per slot: it was {picture!r:.200}")


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
        if found := difference(frozen, live, 0.0):
            raise ContractViolation(
                "what is returned is never changed later (return copies, not buffers): "
                f"{_place(trajectory, index)} changed in {found}"
            )


def _place(trajectory: _Trajectory, index: int) -> str:
    step = f"step {index}" if index else "the first observation"
    return f"{step} of seed {trajectory.seed} in slot {trajectory.slot} ({trajectory.where})"


def _sized(value: Any) -> bool:
    return hasattr(value, "__len__")
