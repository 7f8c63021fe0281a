"""Tasks of the tests' own, found by import path as a user's would be."""

from collections.abc import Sequence
from dataclasses import replace
from threading import Event
from typing import Any

from sim.contract import StepResult
from sim.text.arithmetic import Arithmetic


class Parity(Arithmetic):
    """Asks sums, and rewards answers whose code points add up to an even number: a random policy gets about half."""

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        results = super().step(slots, actions)
        return [
            replace(result, reward=float(sum(map(ord, action)) % 2 == 0))
            for result, action in zip(results, actions, strict=True)
        ]


class Raises(Arithmetic):
    """Breaks at an answer after `good_steps` calls."""

    def __init__(self, *, num_slots: int, good_steps: int = 3, **keywords: Any) -> None:
        super().__init__(num_slots=num_slots, **keywords)
        self._left = good_steps

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        self._left -= 1
        if self._left < 0:
            raise ZeroDivisionError("the abacus is broken")
        return super().step(slots, actions)


class Stops(Arithmetic):
    """Asks for the debugger at its first step."""

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        breakpoint()
        return super().step(slots, actions)


class Hangs(Arithmetic):
    """Answers `good_steps` calls, then waits for what never comes."""

    def __init__(self, *, num_slots: int, good_steps: int = 3, **keywords: Any) -> None:
        super().__init__(num_slots=num_slots, **keywords)
        self._left = good_steps

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        self._left -= 1
        if self._left < 0:
            Event().wait()
        return super().step(slots, actions)
