"""Rewards by import path: values, names of what fails, time limits."""

from collections.abc import Iterator
from typing import Any

import pytest
import reward_functions

from sim.text.number_reward import Number
from sim.text.rewards import Reply, RewardError, Rewards, RewardSettings, exact, matches


def rewards(*tables: Any, workers: int = 4) -> Rewards:
    named = [{"function": t} if isinstance(t, str) else t for t in tables]
    settings = [RewardSettings.of(table, "rewards") for table in named]
    return Rewards(settings, workers=workers)


def replies(*texts: str) -> list[Reply]:
    return [
        Reply(text=text, row={"answer": "4"}, where=f"rows.jsonl, line {number}")
        for number, text in enumerate(texts, start=1)
    ]


@pytest.fixture
def released() -> Iterator[None]:
    """Calls that wait end with the test."""
    reward_functions.release.clear()
    yield
    reward_functions.release.set()


def test_functions_classes_and_coroutines_side_by_side() -> None:
    """Each reply gets a score of each reward, in the order given."""
    made = rewards(
        {"function": "reward_functions:length", "args": {"most": 4}},
        "reward_functions:asks",
        "reward_functions:told",
        {"function": "reward_functions:Judge", "args": {"name": "J"}},
        "exact",
    )
    scores = made.score(replies("ab", " 4 "))
    assert [[score.value for score in each] for each in scores] == [
        [0.5, 2.0, 0.5, 1.0, 0.0],
        [0.75, 3.0, 0.5, 1.0, 1.0],
    ]
    assert scores[0][2].info == {"first": "a"}
    assert scores[0][3].info == {"by": "J"}
    made.close()
    assert reward_functions.closed == ["J"]
    assert made.score([]) == []


def test_slow_rewards_are_computed_side_by_side() -> None:
    """Two that wait for each other both end."""
    scores = rewards("reward_functions:meets", workers=2).score(replies("a", "b", "c", "d"))
    assert [each[0].value for each in scores] == [1.0] * 4


def test_error_names_function_and_row() -> None:
    """The function's own error is the cause."""
    with pytest.raises(RewardError) as caught:
        rewards("reward_functions:breaks").score(replies("a"))
    assert str(caught.value) == (
        'reward "breaks" (reward_functions:breaks) on rows.jsonl, line 1: '
        "ZeroDivisionError: the abacus is broken"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("what", ["nan", "text", "none"])
def test_what_is_no_number_is_refused(what: str) -> None:
    """A NaN would spoil the whole batch."""
    made = rewards({"function": "reward_functions:returns", "args": {"what": what}})
    with pytest.raises(RewardError, match=r"line 1: it must return a finite number or a Score"):
        made.score(replies("a"))


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("function", ["waits", "never"])
def test_overrun_names_function_and_row(function: str) -> None:
    """In a thread and in the loop."""
    made = rewards({"function": f"reward_functions:{function}", "timeout_s": 0.05, "name": "slow"})
    with pytest.raises(
        RewardError, match=r'"slow" .* line 1: it took longer than timeout_s = 0.05'
    ):
        made.score(replies("a"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, 'rewards needs "function"'),
        ({"function": "exakt"}, r"give an import path, module:function, or one of exact"),
        ({"function": "exact", "wait": 1}, 'rewards takes no "wait": did you mean weight'),
        ({"function": "exact", "weight": "1"}, "rewards.weight = '1': it must be a number"),
        ({"function": "exact", "weight": float("inf")}, "must be a finite number"),
        ({"function": "exact", "timeout_s": 0}, "timeout_s = 0: it must be more than 0"),
        ({"function": "exact", "args": {"fild": "x"}}, "unexpected keyword argument 'fild'"),
        ({"function": "matches"}, "missing a required argument: 'pattern'"),
        ({"function": "nowhere:f"}, "there is no module nowhere: its folder must be on PYTHONPATH"),
        ({"function": "reward_functions:f"}, "module reward_functions has no f"),
    ],
)
def test_wrong_reward_is_told(table: dict[str, Any], message: str) -> None:
    """When the job is submitted, or where only the env actor can know, when it starts."""
    with pytest.raises(ValueError, match=message):
        rewards(table)


def test_exact_and_matches() -> None:
    """White space around does not count; a pattern may span lines."""
    assert exact(" 4\n", {"answer": 4}) == 1.0
    assert exact("4 apples", {"answer": 4}) == 0.0
    pattern = "<think>.*</think>"
    assert matches("<think>a\nb</think> 4", {}, pattern=pattern) == 1.0
    assert matches("4", {}, pattern=pattern) == 0.0
    with pytest.raises(ValueError, match=r'the row has no "answer" but \[.tests.\]'):
        exact("4", {"tests": 1})


def test_number() -> None:
    """The reference may be a number, a text, or end a worked solution."""
    pytest.importorskip("math_verify")
    reward = Number()
    for reference in (1200, 1200.0, "1,200", "600+600\n#### 1,200", r"so \boxed{1200}"):
        assert reward("It is 1,200.", {"answer": reference}).value == 1.0
        assert reward("It is 1,201.", {"answer": reference}).value == 0.0
    assert reward("#### 7", {"answer": 7}).info == {"answer": "7", "rule": "####"}
    for bad in ("none", None, True, [1]):
        with pytest.raises(
            ValueError, match='"answer" must be a number or a text that ends in one'
        ):
            reward("1", {"answer": bad})
