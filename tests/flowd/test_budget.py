"""Restart budgets, with the clock and the commits passed in."""

from collections.abc import Iterable

import pytest

from flowd.budget import RestartBudget


def allowed(budget: RestartBudget, asked: Iterable[tuple[float, int]]) -> list[bool]:
    """Whether each restart is, given its time and the last committed step."""
    return [budget.ask(now, step) is None for now, step in asked]


def test_restarts_within_the_window_are_bounded() -> None:
    """Two restarts per 60 s are forgiven, the third is refused; the window slides."""
    budget = RestartBudget(max_restarts=2, window_s=60.0, max_without_commit=99)
    assert allowed(budget, [(0.0, 1), (30.0, 2), (59.9, 3)]) == [True, True, False]
    assert allowed(budget, [(60.0, 3)]) == [True]  # the one at 0 left the window
    assert allowed(budget, [(89.9, 4), (90.0, 4)]) == [False, True]


def test_restarts_without_a_commit_are_bounded_however_slow() -> None:
    """A crash a day that never reaches the next commit is a loop all the same."""
    budget = RestartBudget(max_restarts=3, window_s=60.0, max_without_commit=5)
    days = [day * 86400.0 for day in range(6)]
    assert allowed(budget, [(day, 4) for day in days]) == [True] * 5 + [False]


def test_a_new_commit_fills_the_budget_again() -> None:
    """A job that gets on, crash by crash, is not in a loop."""
    budget = RestartBudget(max_restarts=3, window_s=60.0, max_without_commit=2)
    days = [day * 86400.0 for day in range(20)]
    assert all(allowed(budget, [(day, number // 2) for number, day in enumerate(days)]))


def test_a_commit_taken_back_is_no_progress() -> None:
    """After a rollback the job commits steps that it had committed before: nothing is gained by that."""
    budget = RestartBudget(max_restarts=9, window_s=1.0, max_without_commit=2)
    assert allowed(budget, [(0.0, 9), (10.0, 4), (20.0, 9), (30.0, 10)]) == [
        True,
        True,
        False,
        True,
    ]


def test_a_refused_restart_does_not_count() -> None:
    """Asking again and again does not keep the budget empty."""
    budget = RestartBudget(max_restarts=1, window_s=10.0, max_without_commit=99)
    assert allowed(budget, [(0.0, 0)]) == [True]
    assert not any(allowed(budget, [(float(now), 0) for now in range(1, 10)]))
    assert allowed(budget, [(10.0, 0)]) == [True]


def test_the_refusal_names_the_limit_that_was_reached() -> None:
    """It ends a job, so a user reads it."""
    budget = RestartBudget(max_restarts=1, window_s=60.0, max_without_commit=1)
    budget.ask(0.0, 3)
    assert budget.ask(1.0, 3) == "it was restarted 1 time within 60 s already, the limit"
    assert budget.ask(99.0, 3) == "it was restarted 1 time without a new commit already, the limit"


def test_no_restarts_at_all() -> None:
    """0 forbids every restart."""
    budget = RestartBudget(max_restarts=0, window_s=1.0, max_without_commit=1)
    assert budget.ask(100.0, 1) is not None


@pytest.mark.parametrize(
    ("max_restarts", "window_s", "max_without_commit"), [(-1, 1.0, 1), (1, 0.0, 1), (1, 1.0, -1)]
)
def test_senseless_budgets_are_refused(
    max_restarts: int, window_s: float, max_without_commit: int
) -> None:
    """The value seen is in the message."""
    with pytest.raises(ValueError, match=r"-1|0\.0"):
        RestartBudget(
            max_restarts=max_restarts, window_s=window_s, max_without_commit=max_without_commit
        )
