"""A reward for replies that end in a number, read as `sim.text.grading` tells."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from sim.errors import BadTaskData
from sim.text.grading import final_answer, is_correct, require_math_verify
from sim.text.rewards import Score


class Number:
    """1 where the reply's final number equals that of a field, else 0.

    `info` has the answer as it was read, and the rule by which it was found.

    field: a number, or a text that is one or ends in one (GSM8K's "… #### 42", MATH's "\\boxed{42}")
    """

    def __init__(self, *, field: str = "answer") -> None:
        require_math_verify()
        self._field = field

    def __call__(self, reply: str, row: Mapping[str, Any]) -> Score:
        """Grade one reply. BadTaskData: the field holds no number."""
        answer = final_answer(reply)
        correct = is_correct(answer, self._reference(row))
        return Score(value=float(correct), info={"answer": str(answer), "rule": answer.rule})

    def _reference(self, row: Mapping[str, Any]) -> Fraction:
        value = row.get(self._field)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            reference = final_answer(str(value)).number
            if reference is not None:
                return reference
        raise BadTaskData(
            f'"{self._field}" must be a number or a text that ends in one; it is {value!r:.60}'
        )
