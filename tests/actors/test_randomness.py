"""Keyed draws: what makes them reproducible, and what would make two samples of a group the same."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.randomness import MASK64, fold, mix, uniform, uniform_table

INTEGERS = st.integers(min_value=0, max_value=MASK64)


def test_mix_is_the_splitmix64_finalizer() -> None:
    """The reference sequence from state 1234567 (Vigna, splitmix64.c), whose output is mix of a counter."""
    state = 1234567
    outputs = []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        outputs.append(mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_pinned_values_stay() -> None:
    """A run is resumed by a later version: its keys and draws may never change."""
    assert fold() == 0
    assert fold(0) == 258863698125685209
    assert fold(7, 2, 31, 4, 0) == 6418989522339193322
    assert uniform(fold(7, 2, 31, 4, 0), 0) == 0.2449877258080705
    assert uniform(fold(7, 2, 31, 4, 0), 5) == 0.10903639468357107


@given(st.lists(INTEGERS, min_size=2, max_size=6, unique=True))
def test_order_of_parts_matters(parts: list[int]) -> None:
    """Sample 1 of turn 2 is not sample 2 of turn 1."""
    assert fold(*parts) != fold(*reversed(parts))


@given(st.lists(INTEGERS, max_size=5), INTEGERS)
def test_a_further_part_makes_another_key(parts: list[int], more: int) -> None:
    """A key of fewer parts is no prefix of another: (seed, group) never equals (seed, group, 0)."""
    assert fold(*parts) != fold(*parts, more)


@given(INTEGERS, st.integers(min_value=0, max_value=1 << 20))
def test_uniform_is_in_the_half_open_interval(key: int, position: int) -> None:
    """0 <= u < 1: inverting a cumulative distribution at 1 would run past its end."""
    assert 0.0 <= uniform(key, position) < 1.0


def test_uniform_never_rounds_up_to_one() -> None:
    """The largest 53 bits give the float below 1."""
    assert (MASK64 >> 11) * 2.0**-53 == np.nextafter(1.0, 0.0)


def test_no_two_turns_of_a_job_share_a_key() -> None:
    """Over a grid of seeds, purposes, groups, samples and turns all keys differ."""
    keys = {
        fold(seed, purpose, group, sample, turn)
        for seed in range(2)
        for purpose in range(1, 4)
        for group in range(300)
        for sample in range(8)
        for turn in range(4)
    }
    assert len(keys) == 2 * 3 * 300 * 8 * 4


def test_neighbouring_keys_draw_independently() -> None:
    """Draws of neighbouring samples and positions are uncorrelated and uniform, as counters of good bits are."""
    draws = np.array(
        [[uniform(fold(0, 2, group, 0, 0), i) for i in range(64)] for group in range(64)]
    )
    assert draws.mean() == pytest.approx(0.5, abs=0.02)
    assert draws.var() == pytest.approx(1 / 12, abs=0.005)
    between_positions = np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]
    between_groups = np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]
    assert abs(between_positions) < 0.06  # about 4 standard errors of 4032 pairs
    assert abs(between_groups) < 0.06


@given(st.lists(INTEGERS, max_size=4), st.integers(0, 6))
def test_a_table_has_the_draws_of_its_keys(keys: list[int], positions: int) -> None:
    """Bit for bit, as what is sampled may not depend on how."""
    table = uniform_table(keys, positions)
    assert table.shape == (len(keys), positions)
    assert table.tolist() == [[uniform(key, at) for at in range(positions)] for key in keys]
