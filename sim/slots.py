"""From a simulator of one episode to an environment of many slots: what every wrapped simulator shares.

A slot has a simulator of its own, made when the slot is first reset. Here are the step limit, the two definitions of
success, and the refusal to step what has ended; a wrapper of a simulator has only what is that simulator's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sim.contract import StepResult
from sim.errors import SimError
from sim.spaces import ArraySpace, ObservationSpace

Observation = dict[str, Any]  # named arrays and texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one step of a simulator gave. terminated, truncated: as the simulator says, maybe both at once
    success: at this step; None where the simulator does not say
    """

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool = False
    success: bool | None = None
    info: Mapping[str, float | str] = field(default_factory=dict)


class Simulator(Protocol):
    """Plays one episode at a time. What it returns are copies of its own."""

    observation_space: ObservationSpace
    action_space: ArraySpace

    def reset(self, seed: int) -> Observation:
        """Start an episode; all of it depends on the seed and the actions alone."""
        ...

    def step(self, action: NDArray[Any]) -> Outcome:
        """Take one step. Called between a reset and the end of its episode only."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """A picture: uint8 [H, W, 3]. SimError: it has none to show."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


@dataclass(slots=True)
class _Slot:
    simulator: Simulator
    steps: int = 0
    success_once: bool = False
    running: bool = False


class SimulatorSlots:
    """An environment with a simulator per slot.

    make: makes a simulator; called once at the start, so that what is missing is told at once, and again whenever
        a slot is reset for the first time
    max_steps: episodes are truncated after so many; None leaves it to the simulator
    ignore_terminations: episodes go on until they are truncated, whatever the simulator says

    ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        make: Callable[[], Simulator],
        num_slots: int,
        *,
        max_steps: int | None = None,
        ignore_terminations: bool = False,
    ) -> None:
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"max_steps = {max_steps}: allow at least 1")
        self._make = make
        self._max_steps = max_steps
        self._ends = not ignore_terminations
        first = make()
        self._spare: list[Simulator] = [first]
        self._slots: list[_Slot | None] = [None] * num_slots
        self.observation_space = first.observation_space
        self.action_space = first.action_space

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Observation]:
        """Start an episode in each slot."""
        observations = []
        for number, seed in zip(slots, seeds, strict=True):
            slot = self._slots[number]
            if slot is None:
                slot = _Slot(self._spare.pop() if self._spare else self._make())
                self._slots[number] = slot
            slot.running = False  # until the simulator has said yes
            observations.append(slot.simulator.reset(seed))
            slot.steps, slot.success_once, slot.running = 0, False, True
        return observations

    def step(self, slots: Sequence[int], actions: Sequence[NDArray[Any]]) -> list[StepResult]:
        """Step each slot in turn. SimError: a slot has no episode; nothing is stepped."""
        running = [self._running(number) for number in slots]
        return [self._step(slot, action) for slot, action in zip(running, actions, strict=True)]

    def render(self, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        """A picture of each slot; also of one whose episode has ended. SimError: a slot never had one."""
        pictures = []
        for number in slots:
            slot = self._slots[number]
            if slot is None:
                raise SimError(f"slot {number} was never reset: there is nothing to render")
            pictures.append(slot.simulator.render())
        return pictures

    def close(self) -> None:
        """Close every simulator."""
        for simulator in (*self._spare, *(slot.simulator for slot in self._slots if slot)):
            simulator.close()

    def _running(self, number: int) -> _Slot:
        slot = self._slots[number]
        if slot is None or not slot.running:
            raise SimError(f"slot {number} has no episode (ended or never begun): reset it first")
        return slot

    def _step(self, slot: _Slot, action: NDArray[Any]) -> StepResult:
        outcome = slot.simulator.step(action)
        slot.steps += 1
        terminated = outcome.terminated and self._ends
        truncated = not terminated and (outcome.truncated or slot.steps == self._max_steps)
        slot.running = not (terminated or truncated)
        info = dict(outcome.info)
        if outcome.success is not None:
            slot.success_once |= outcome.success
            info["success_once"] = float(slot.success_once)
            info["success_at_end"] = float(outcome.success)
        return StepResult(
            observation=outcome.observation,
            reward=outcome.reward,
            terminated=terminated,
            truncated=truncated,
            info=info,
        )
