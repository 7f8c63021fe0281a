"""pass@k and intervals: by hand, by brute force, by identities."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.conductor.estimators import (
    Z95,
    pass_at_k,
    powers_of_two,
    score_interval,
    wilson_interval,
)


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    """samples, solved, k"""
    n = draw(st.integers(1, 9))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # of the 6 pairs 3 have the one that is solved
        (5, 2, 3, 0.9),  # of the 10 triples 1 has neither
        (3, 0, 3, 0.0),
        (3, 2, 2, 1.0),  # only one is not solved
        (7, 3, 1, 3 / 7),
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    """Worked on paper."""
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@given(counts())
def test_pass_at_k_is_the_share_of_subsets_with_a_solved_one(case: tuple[int, int, int]) -> None:
    """Every subset of k of the n samples counted."""
    n, c, k = case
    solved = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(solved, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 8), st.data(), st.fractions(0, 1, max_denominator=20))
def test_pass_at_k_is_unbiased(n: int, data: st.DataObject, p: Fraction) -> None:
    """Its expectation over the number solved, exactly: 1 - (1 - p)^k. That of 1 - (1 - c/n)^k is another."""
    k = data.draw(st.integers(1, n))
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    expected = sum(float(chance[c]) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(float(1 - (1 - p) ** k), abs=1e-12)


@given(counts())
def test_pass_at_k_grows_with_k_and_with_what_is_solved(case: tuple[int, int, int]) -> None:
    """More tries, or more solved, never lower it; one try gives the share solved."""
    n, c, k = case
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    if k < n:
        assert pass_at_k(n, c, k + 1) >= pass_at_k(n, c, k) - 1e-15
    if c < n:
        assert pass_at_k(n, c + 1, k) >= pass_at_k(n, c, k) - 1e-15


def test_pass_at_k_of_many_samples_is_finite() -> None:
    """Binomials far beyond a float."""
    assert pass_at_k(5000, 1, 2500) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_numbers_that_cannot_be_are_refused(n: int, c: int, k: int) -> None:
    """More solved than sampled, more tries than samples."""
    with pytest.raises(ValueError, match="the rule is"):
        pass_at_k(n, c, k)


def test_powers_of_two() -> None:
    """Up to the limit, which counts if it is one."""
    assert [powers_of_two(limit) for limit in (0, 1, 6, 8)] == [
        [],
        [1],
        [1, 2, 4],
        [1, 2, 4, 8],
    ]


def test_wilson_by_hand() -> None:
    """8 of 10: (0.8 + z²/20 ± z √(0.016 + z²/400)) / (1 + z²/10), the 49.0 % to 94.3 % of the textbooks."""
    low, high = wilson_interval(0.8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson_interval(0.0, 10)[0] == 0.0
    assert wilson_interval(0.0, 10)[1] == pytest.approx(Z95**2 / (10 + Z95**2))


@given(st.integers(1, 500), st.data())
def test_wilson_bounds_are_where_the_score_test_is_at_z(n: int, data: st.DataObject) -> None:
    """What defines it: both bounds q satisfy |p - q| = z √(q (1 - q) / n)."""
    p = data.draw(st.integers(0, n)) / n
    for q in wilson_interval(p, n):
        assert 0.0 <= q <= 1.0
        assert abs(p - q) == pytest.approx(Z95 * math.sqrt(q * (1 - q) / n), abs=1e-7)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=50))
def test_one_sample_of_each_problem_is_plain_wilson(scores: list[float]) -> None:
    """As many trials as problems."""
    mean = sum(scores) / len(scores)
    assert score_interval([[score] for score in scores]) == pytest.approx(
        wilson_interval(mean, len(scores))
    )


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=30), st.integers(2, 8))
def test_repeating_every_sample_makes_nothing_more_certain(scores: list[float], k: int) -> None:
    """Samples that always agree within a problem are one trial."""
    once = score_interval([[score] for score in scores])
    assert score_interval([[score] * k for score in scores]) == pytest.approx(once)


def test_samples_that_differ_within_problems_count_for_more() -> None:
    """Half solved of every problem: problems are alike, so it is known better than from as many coins as problems."""
    low, high = score_interval([[0.0, 1.0, 0.0, 1.0 - i % 2] for i in range(20)]) or (0, 0)
    coarse = wilson_interval(0.375, 20)
    assert high - low < coarse[1] - coarse[0]
    even = score_interval([[0.0, 1.0]] * 20)
    assert even == wilson_interval(0.5, 20), "no spread at all says nothing: as many as problems"


def test_other_scores_have_a_normal_interval() -> None:
    """Means 1, 2, 3 of two samples each: 2 ± 1.96 · 1 / √3."""
    interval = score_interval([[0.5, 1.5], [2.0, 2.0], [3.0, 3.0]])
    assert interval == pytest.approx((2 - Z95 / 3**0.5, 2 + Z95 / 3**0.5))
    assert score_interval([[0.5, 0.7]]) is None
