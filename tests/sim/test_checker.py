"""The contract check passes a good environment and names the rule that a bad one breaks."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sim.checker import Checked, ContractViolation, check
from sim.contract import StepResult
from sim.errors import SimError
from sim.spaces import ArraySpace


class Walk:
    """A seeded walk on arrays: ends by itself after 3 to 6 steps, is cut after 5."""

    opened: list["Walk"] = []  # noqa: RUF012

    def __init__(self, *, num_slots: int) -> None:
        self.states: list[tuple[int, int, np.random.Generator] | None] = [None] * num_slots
        self.closed = 0
        Walk.opened.append(self)

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        position = draw.normal(size=3).astype(np.float32)
        return {"position": position, "torch": torch.tensor([time]), "text": f"step {time}"}

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        observations = []
        for slot, seed in zip(slots, seeds, strict=True):
            draw = np.random.default_rng(seed)
            self.states[slot] = (seed, 0, draw)
            observations.append(self.observe(slot, seed, 0, draw))
        return observations

    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = []
        for slot, action in zip(slots, actions, strict=True):
            state = self.states[slot]
            if state is None:
                raise SimError(f"slot {slot} has no episode: reset it first")
            seed, time, draw = state
            time += 1
            terminated = time == 3 + seed % 4
            truncated = not terminated and time == 5
            self.states[slot] = None if terminated or truncated else (seed, time, draw)
            observation = self.observe(slot, seed, time, draw)
            results.append(
                StepResult(
                    observation=observation,
                    reward=float(action),
                    terminated=terminated,
                    truncated=truncated,
                    info={"time": float(time), "note": "walking"},
                )
            )
        return results

    def close(self) -> None:
        self.closed += 1


def action(observation: Any) -> float:
    return float(observation["position"][0])


def test_good_environment_passes_and_is_closed() -> None:
    """All episodes end within the steps given, and every environment made is closed once."""
    Walk.opened.clear()
    checked = check(Walk, actions=action)
    assert checked == Checked(episodes=24, steps=checked.steps, ended=24)
    assert [env.closed for env in Walk.opened] == [1, 1]


def test_cut_episodes_are_counted_as_not_ended() -> None:
    """With fewer steps than an episode has, the report says that no end was seen."""
    assert check(Walk, actions=action, max_steps=2) == Checked(episodes=24, steps=48, ended=0)


def test_actions_may_be_random() -> None:
    """They are drawn once and replayed, so the runs stay comparable."""
    draw = np.random.default_rng(0)
    assert check(Walk, actions=lambda observation: draw.normal()).ended == 24


class DependsOnSlot(Walk):
    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        return super().observe(slot, seed, time, draw) | {"text": f"slot {slot}"}


class SharesRandomState(Walk):
    draw = np.random.default_rng(0)

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        return super().observe(slot, seed, time, draw if time else self.draw)


class DrawsFromCompany(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        return [replace(r, reward=r.reward + len(slots)) for r in super().step(slots, actions)]


class EndsByCompany(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, actions)
        return (
            [replace(r, terminated=True, truncated=False) for r in results]
            if len(slots) == 1
            else results
        )


class SortsBySlot(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        order = sorted(range(len(slots)), key=lambda index: slots[index])
        return super().step([slots[i] for i in order], [actions[i] for i in order])


class ReusesBuffer(Walk):
    buffer = np.zeros(3, dtype=np.float32)

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        observation = super().observe(slot, seed, time, draw)
        self.buffer[:] = observation["position"]
        return observation | {"position": self.buffer}


class ReusesBufferPerSlot(Walk):
    """The usual slip of a simulator: one row of one big array per slot."""

    def __init__(self, *, num_slots: int) -> None:
        super().__init__(num_slots=num_slots)
        self.rows = np.zeros((num_slots, 3), dtype=np.float32)

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        observation = super().observe(slot, seed, time, draw)
        self.rows[slot] = observation["position"]
        return observation | {"position": self.rows[slot]}


class KeepsWhatItReturned(Walk):
    """It goes on from the very array that it gave away."""

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        observation = super().observe(slot, seed, time, draw)
        previous = getattr(self, "given", {}).get(slot) if time else None
        if previous is not None:
            observation["position"] = observation["position"] + previous
        self.given = {**getattr(self, "given", {}), slot: observation["position"]}
        return observation


class ForgetsAtReset(Walk):
    """A reset of any slot draws from the random states of all others."""

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        for slot, state in enumerate(self.states):
            if state is not None and slot not in slots:
                state[2].normal()
        return super().reset(slots, seeds)


class ChangesActions(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, [action[0] for action in actions])
        for action in actions:
            action *= 2
        return results


class LeavesItsSpace(Walk):
    observation_space: ClassVar = {
        "position": ArraySpace(shape=(3,), dtype="float32", low=-1.0, high=1.0)
    }

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        return {"position": super().observe(slot, seed, time, draw)["position"]}


class ForgetsSuccess(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, actions)
        times = [result.info["time"] for result in results]
        success = [{"success_once": float(t == 1), "success_at_end": float(t == 1)} for t in times]
        return [replace(r, info=s) for r, s in zip(results, success, strict=True)]


class WrongSteps(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        rewards = np.array([1.0, 2.0], dtype=np.float32)
        return [replace(r, step_rewards=rewards) for r in super().step(slots, actions)]


class MovesForPictures(Walk):
    def render(self, slots: Sequence[int]) -> list[np.ndarray[Any, Any]]:
        for slot in slots:
            if (state := self.states[slot]) is not None:
                state[2].normal()
        return [np.zeros((4, 4, 3), dtype=np.uint8) for _ in slots]


class GreyPictures(Walk):
    def render(self, slots: Sequence[int]) -> list[np.ndarray[Any, Any]]:
        return [np.zeros((4, 4), dtype=np.uint8) for _ in slots]


class EndsTwice(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        return [
            replace(r, truncated=r.truncated or r.terminated) for r in super().step(slots, actions)
        ]


class NumpyBool(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, actions)
        return [replace(r, terminated=np.bool_(r.terminated)) for r in results]  # type: ignore[arg-type]


class NanReward(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        return [replace(r, reward=float("nan")) for r in super().step(slots, actions)]


class ArrayInfo(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        return [replace(r, info={"a": np.zeros(2)}) for r in super().step(slots, actions)]  # type: ignore[dict-item]


class DropsOne(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, actions)
        return results[:-1] if len(results) > 1 else results


class StacksObservations(Walk):
    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        return {"all": super().reset(slots, seeds)}  # type: ignore[return-value]


class ReturnsTuples(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        return [(r.observation, r.reward) for r in super().step(slots, actions)]  # type: ignore[misc]


class ResetsByItself(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, actions)
        for slot, result in zip(slots, results, strict=True):
            if result.terminated or result.truncated:
                self.reset([slot], [0])
        return results


class StepsUnused(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        if slots == [0] and self.states[0] is None:
            self.reset([0], [0])
        return super().step(slots, actions)


class RaisesIndexError(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        try:
            return super().step(slots, actions)
        except SimError as error:
            raise IndexError("list index out of range") from error


class NamesNoSlot(Walk):
    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        try:
            return super().step(slots, actions)
        except SimError as error:
            raise SimError("no episode") from error


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (DependsOnSlot, r"same seed .* differ in it\['text'\]: 'slot 0' against 'slot 4'"),
        (SharesRandomState, r"same seed .*alone, again\) differ in it\['position'\]"),
        (DrawsFromCompany, r"same seed .*in company\) differ in it\.reward"),
        (EndsByCompany, r"same seed .*differ in it\.terminated"),
        (SortsBySlot, r"same seed .*in company\) differ"),
        (ReusesBuffer, r"differ in|never changed later"),
        (
            ReusesBufferPerSlot,
            r"never changed later .*first observation .*changed in it\['position'\]",
        ),
        (
            KeepsWhatItReturned,
            r"same seed .*alone, again\) differ in it\.observation\['position'\]",
        ),
        (ForgetsAtReset, r"same seed .*one after another\) differ"),
        (LeavesItsSpace, r"observations lie in observation_space: .*'position' is .* outside of"),
        (
            ForgetsSuccess,
            r"success_once stays at 1\.0: .* were 0\.0 and 0\.0, success_once 1\.0 before",
        ),
        (WrongSteps, r"step_rewards are float32 \[steps\] with the sum"),
        (MovesForPictures, r"same seed .*alone, again\) differ"),
        (GreyPictures, r"render returns uint8 \[H, W, 3\] per slot"),
        (EndsTwice, "never both true"),
        (NumpyBool, r"terminated is a bool"),
        (NanReward, "a reward is a finite float.*nan"),
        (ArrayInfo, "info maps strings to numbers"),
        (DropsOne, "one entry per slot: 4 asked, 3 in a list returned"),
        (StacksObservations, "one entry per slot: 1 asked, 1 in a dict returned"),
        (ReturnsTuples, "step returns StepResults"),
        (ResetsByItself, "whose episode has ended raises SimError: it returned"),
        (StepsUnused, "never reset raises SimError: it returned"),
        (RaisesIndexError, r"raises SimError: it raised IndexError"),
        (NamesNoSlot, "names the slot"),
    ],
)
def test_each_broken_rule_is_named(broken: Callable[..., Walk], rule: str) -> None:
    """The message says the rule, the place, and what was seen; the environment is closed anyway."""
    Walk.opened.clear()
    with pytest.raises(ContractViolation, match=rule):
        check(broken, actions=action)
    assert [env.closed for env in Walk.opened] == [1, 1]


def test_an_action_stays_the_policys() -> None:
    """What was handed to step is not written to."""
    with pytest.raises(ContractViolation, match=r"an action .* stays as it is: step 1 .* changed"):
        check(ChangesActions, actions=lambda observation: np.ones(1))


class CutsAt(Walk):
    """A walk of steady steps whose limit can be chosen."""

    limit = 5

    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        results = super().step(slots, actions)
        cut = [result.info["time"] == self.limit for result in results]
        for slot, ended in zip(slots, cut, strict=True):
            if ended:
                self.states[slot] = None
        return [
            replace(r, terminated=False, truncated=c) for r, c in zip(results, cut, strict=True)
        ]


class CutsLater(CutsAt):
    limit = 6


class ShowsNextEpisode(CutsAt):
    """Autoreset in disguise: with the end comes the first observation of the next episode."""

    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        new = {"position": np.zeros(3, dtype=np.float32), "torch": torch.tensor([0]), "text": "new"}
        return [
            replace(r, observation=new) if r.truncated else r for r in super().step(slots, actions)
        ]


def test_the_last_observation_is_compared_with_a_longer_episode() -> None:
    """It is the one that the value is bootstrapped from."""
    seeds = (2, 3)  # the walk of these has five steps or more
    check(CutsAt, actions=action, seeds=seeds, uncut=CutsLater)
    with pytest.raises(ContractViolation, match=r"true last one: step 5 of seed 2 .* differ in it"):
        check(ShowsNextEpisode, actions=action, seeds=seeds, uncut=CutsLater)


def test_without_actions_the_action_space_is_drawn_from() -> None:
    """An environment without one needs actions."""
    with pytest.raises(ValueError, match="no action_space to draw from: give actions"):
        check(Walk)


class Jitters(Walk):
    count = 0

    def observe(self, slot: int, seed: int, time: int, draw: np.random.Generator) -> Any:
        Jitters.count += 1
        observation = super().observe(slot, seed, time, draw)
        return observation | {
            "position": observation["position"] + np.float32(1e-4 * (self.count % 2))
        }


def test_tolerance_forgives_small_differences() -> None:
    """Physics that depends on the batch passes with a tolerance above its differences."""
    with pytest.raises(ContractViolation, match="same seed"):
        check(Jitters, actions=lambda observation: 0.0, tolerance=1e-6)
    check(Jitters, actions=lambda observation: 0.0, tolerance=1e-3)


def test_errors_of_the_environment_propagate() -> None:
    """A crash is not a broken rule."""

    class Crashes(Walk):
        def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
            raise RuntimeError("no display")

    with pytest.raises(RuntimeError, match="no display"):
        check(Crashes, actions=action)


def test_too_few_seeds_or_steps_are_refused() -> None:
    """Company needs two different episodes, and a trajectory a step."""
    with pytest.raises(ValueError, match="two or more"):
        check(Walk, actions=action, seeds=[1, 1])
    with pytest.raises(ValueError, match="max_steps = 0"):
        check(Walk, actions=action, max_steps=0)
