"""Which row an index leads to: every row once an epoch, sources by weight, easy before hard."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.text.ordering import BLOCK, Epochs, Mixture, permutation


@given(st.integers(0, 2**64 - 1), st.integers(1, 200))
def test_permutation_has_every_index_once(key: int, size: int) -> None:
    """Whatever the key."""
    assert sorted(permutation(key, size)) == list(range(size))


def test_permutation_never_changes() -> None:
    """A later version must not give a resumed job another order."""
    assert permutation(0, 8).tolist() == PERMUTATION_OF_KEY_0
    assert permutation(2**64 - 1, 8).tolist() != PERMUTATION_OF_KEY_0


def test_all_orders_are_equally_likely() -> None:
    """The six orders of three, over 6000 keys: each 1000 times, within five standard deviations."""
    counts = Counter(tuple(permutation(key, 3)) for key in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * np.sqrt(6000 * 5 / 36) for count in counts.values())


def test_epochs_have_every_row_once_in_another_order() -> None:
    """A position counts on from epoch to epoch; key and name have orders of their own."""
    epochs = Epochs(50, name="a")
    first, second = ([epochs.row(7, 50 * e + i) for i in range(50)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert [epochs.row(8, i) for i in range(50)] != first
    assert [Epochs(50, name="b").row(7, i) for i in range(50)] != first
    assert [Epochs(50, name="a").row(7, i) for i in reversed(range(50))] == first[::-1]
    plain = Epochs(50, name="a", shuffle=False)
    assert [plain.row(7, i) for i in range(100)] == [*range(50), *range(50)]


def test_levels_go_from_easy_to_hard() -> None:
    """Within an epoch; rows are shuffled within a level and each is there once."""
    rates = np.linspace(0, 1, 30)  # row 29 is the easiest
    epochs = Epochs(30, name="a", pass_rates=rates.tolist(), levels=3)
    for epoch in range(2):
        rows = [epochs.row(0, 30 * epoch + i) for i in range(30)]
        assert [set(rows[:10]), set(rows[10:20]), set(rows[20:])] == [
            set(range(20, 30)),
            set(range(10, 20)),
            set(range(10)),
        ]
        assert rows[:10] != sorted(rows[:10], reverse=True)


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_sources_are_drawn_by_weight_without_a_gap(weights: list[float]) -> None:
    """Of each source all positions come, in order; shares are met to within a thousandth per block."""
    total = sum(weights)
    if any(weight / total < 2 / BLOCK for weight in weights):
        return
    mixture = Mixture(weights)
    drawn = [mixture.locate(index) for index in range(2 * BLOCK)]
    for source, weight in enumerate(weights):
        positions = [position for s, position in drawn if s == source]
        assert positions == list(range(len(positions)))
        assert abs(len(positions) / (2 * BLOCK) - weight / total) <= 1 / BLOCK
    for source, weight in enumerate(weights):  # not one source after the other
        early = sum(s == source for s, _ in drawn[:100])
        assert abs(early - 100 * weight / total) <= 2


def test_weight_that_cannot_be_met_is_told() -> None:
    """Rather than a source that never comes."""
    with pytest.raises(ValueError, match=r"weight = 0.0001 is less than a thousandth"):
        Mixture([1.0, 0.0001])


PERMUTATION_OF_KEY_0 = [2, 3, 0, 6, 1, 7, 4, 5]
