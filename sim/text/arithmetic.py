"""Arithmetic with checkable answers: one question, one turn, reward 1 for the exact answer and 0 for anything else."""

import random
from collections.abc import Sequence

from sim.contract import ChatMessage, StepResult, TextObservation
from sim.errors import SimError

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Arithmetic:
    """Sums such as 347 + 185 = 532, with every number written last digit first: "743+581=" is answered by "235".

    That is the order in which one adds on paper: each digit of the answer depends on two digits at a fixed distance
    and on the carry before it, which makes the task learnable for a small model in seconds.

    num_slots: episodes hosted at the same time
    min_digits, max_digits: each operand's number of digits is drawn uniformly from this range; no leading zeros
    operations: the signs to draw from, out of "+-*"; of a difference the larger operand comes first
    reverse: numbers are written last digit first, in question and answer; False writes them as usual

    A problem is a pure function of its seed. ValueError for numbers out of these rules.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        min_digits: int = 3,
        max_digits: int = 3,
        operations: str = "+",
        reverse: bool = True,
    ) -> None:
        if not 1 <= min_digits <= max_digits:
            raise ValueError(
                f"min_digits = {min_digits}, max_digits = {max_digits}: "
                "the rule is 1 <= min_digits <= max_digits"
            )
        if not operations or set(operations) - set(OPERATIONS):
            raise ValueError(
                f'operations = "{operations}": write one or more of {" ".join(OPERATIONS)}'
            )
        self._min_digits = min_digits
        self._max_digits = max_digits
        self._operations = operations
        self._reverse = reverse
        self._answers: list[str | None] = [None] * num_slots

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[TextObservation]:
        """Pose the problem of each seed. Returns one user message each."""
        observations = []
        for slot, seed in zip(slots, seeds, strict=True):
            question, self._answers[slot] = self._problem(seed)
            observations.append(_observation(question))
        return observations

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        """Check each answer, surrounding white space aside. Every episode ends here.

        SimError: a slot has no episode; nothing is changed.
        """
        answers = [self._answer_of(slot) for slot in slots]
        results = []
        for slot, answer, action in zip(slots, answers, actions, strict=True):
            self._answers[slot] = None
            correct = float(action.strip() == answer)
            results.append(
                StepResult(
                    observation=TextObservation(messages=()),
                    reward=correct,
                    terminated=True,
                    truncated=False,
                    info={"correct": correct, "answer": answer},
                )
            )
        return results

    def close(self) -> None:
        """Nothing to free."""

    def examples(self, seeds: Sequence[int]) -> list[tuple[TextObservation, str]]:
        """Worked examples for supervised warm-up: of each seed the observation and the right answer."""
        return [(_observation(question), answer) for question, answer in map(self._problem, seeds)]

    def _answer_of(self, slot: int) -> str:
        answer = self._answers[slot]
        if answer is None:
            raise SimError(f"slot {slot} has no episode (ended or never begun): reset it first")
        return answer

    def _problem(self, seed: int) -> tuple[str, str]:
        # Only `random()` is promised to give the same numbers in every version of Python.
        draw = random.Random(seed).random
        sign = self._operations[int(draw() * len(self._operations))]
        operands = []
        for _ in range(2):
            digits = self._min_digits + int(draw() * (self._max_digits - self._min_digits + 1))
            smallest = 10 ** (digits - 1) if digits > 1 else 0
            operands.append(smallest + int(draw() * (10**digits - smallest)))
        if sign == "-":
            operands.sort(reverse=True)
        numbers = [str(number) for number in (*operands, OPERATIONS[sign](*operands))]
        if self._reverse:
            numbers = [number[::-1] for number in numbers]
        return f"{numbers[0]}{sign}{numbers[1]}=", numbers[2]


def _observation(question: str) -> TextObservation:
    return TextObservation(messages=(ChatMessage(role="user", content=question),))
