"""The arithmetic task: problems by seed, how they are written, and what counts as right."""

from functools import partial
from typing import Any

import pytest

from sim.checker import check
from sim.contract import TextObservation
from sim.errors import SimError
from sim.text.arithmetic import Arithmetic


def question(observation: TextObservation) -> str:
    (message,) = observation.messages
    assert message.role == "user"
    return message.content


@pytest.mark.parametrize("action", ["743", " 1\n", "no number"])
def test_keeps_the_contract(action: str) -> None:
    """One turn: same seed, same problem, in any slot and company; ended slots take no step."""
    make_env = partial(Arithmetic, min_digits=1, max_digits=3, operations="+-*")
    checked = check(make_env, actions=lambda observation: action, seeds=range(12))
    assert checked.ended == checked.steps == checked.episodes


def test_step_without_reset_changes_nothing() -> None:
    """The refused call leaves the other slot its problem."""
    env = Arithmetic(num_slots=2)
    env.reset([0], [5])
    ((_, answer),) = env.examples([5])
    with pytest.raises(SimError, match="slot 1 has no episode"):
        env.step([0, 1], [answer, answer])
    assert env.step([0], [answer])[0].reward == 1.0


@pytest.mark.parametrize("reverse", [True, False])
def test_worked_examples_are_right(reverse: bool) -> None:
    """Python's own arithmetic agrees with every example, and `step` pays for it, white space aside."""
    env = Arithmetic(num_slots=1, min_digits=1, max_digits=4, operations="+-*", reverse=reverse)
    signs = set()
    for seed, (observation, answer) in enumerate(env.examples(range(300))):
        assert env.reset([0], [seed]) == [observation]
        problem = question(observation).removesuffix("=")
        (sign,) = set(problem) & set("+-*")
        signs.add(sign)
        left, right = (
            int(number[::-1] if reverse else number) for number in problem.split(sign, 1)
        )
        value = {"+": left + right, "-": left - right, "*": left * right}[sign]
        assert value >= 0
        assert answer == (str(value)[::-1] if reverse else str(value))
        assert env.step([0], [f" {answer}\n"])[0].reward == 1.0
    assert signs == set("+-*")


@pytest.mark.parametrize("wrong", ["{}0", "0{}", "-{}", "{}.", "the answer is {}", ""])
def test_anything_but_the_exact_answer_earns_nothing(wrong: str) -> None:
    """The whole reply is the answer: no number is looked for in it."""
    env = Arithmetic(num_slots=1)
    ((_, answer),) = env.examples([7])
    env.reset([0], [7])
    (result,) = env.step([0], [wrong.format(answer)])
    assert result.reward == 0.0
    assert result.info == {"correct": 0.0, "answer": answer}
    assert (result.terminated, result.truncated) == (True, False)


def test_operands_have_the_digits_asked_for() -> None:
    """Every number of digits of the range occurs, none outside of it, and no leading zeros."""
    env = Arithmetic(num_slots=1, min_digits=2, max_digits=4, reverse=False)
    seen = set()
    for observation, _ in env.examples(range(300)):
        for number in question(observation).removesuffix("=").split("+"):
            assert str(int(number)) == number
            seen.add(len(number))
    assert seen == {2, 3, 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_digits": 0}, "min_digits = 0"),
        ({"min_digits": 3, "max_digits": 2}, "min_digits = 3, max_digits = 2"),
        ({"operations": "/"}, 'operations = "/"'),
        ({"operations": ""}, 'operations = ""'),
    ],
)
def test_wrong_arguments_say_the_rule(options: dict[str, Any], message: str) -> None:
    """The value seen and the rule."""
    with pytest.raises(ValueError, match=message):
        Arithmetic(num_slots=1, **options)
