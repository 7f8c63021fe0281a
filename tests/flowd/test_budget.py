"""Restart budgets, with the clock passed in."""

import pytest

from flowd.budget import RestartBudget


def test_restarts_within_the_window_are_bounded():
    """Two restarts per 60 s are forgiven, the third is refused; the window slides."""
    budget = RestartBudget(max_restarts=2, window_s=60.0)
    assert [budget.allows(now) for now in (0.0, 30.0, 59.9)] == [True, True, False]
    assert budget.allows(60.0)  # the one at 0 left the window
    assert not budget.allows(89.9)
    assert budget.allows(90.0)


def test_a_refused_restart_does_not_count():
    """Asking again and again does not keep the budget empty."""
    budget = RestartBudget(max_restarts=1, window_s=10.0)
    assert budget.allows(0.0)
    assert not any(budget.allows(float(now)) for now in range(1, 10))
    assert budget.allows(10.0)


def test_no_restarts_at_all():
    """0 forbids every restart."""
    assert not RestartBudget(max_restarts=0, window_s=1.0).allows(100.0)


@pytest.mark.parametrize(("max_restarts", "window_s"), [(-1, 1.0), (1, 0.0)])
def test_senseless_budgets_are_refused(max_restarts, window_s):
    """The value seen is in the message."""
    with pytest.raises(ValueError, match=r"-1|0\.0"):
        RestartBudget(max_restarts, window_s)
