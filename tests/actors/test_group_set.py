"""Sets of group indices as ranges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.conductor.group_set import GroupSet

INDICES = st.frozensets(st.integers(0, 40))


def assert_same(groups: GroupSet, expected: frozenset[int] | set[int]) -> None:
    assert list(groups) == sorted(expected)
    assert len(groups) == len(expected)
    assert groups.end == max(expected, default=-1) + 1
    assert all((group in groups) == (group in expected) for group in range(-1, 43))
    # One way to write each set: so many ranges as there are members without the one before.
    assert len(groups.ranges) == sum(group - 1 not in expected for group in expected)


@given(INDICES, INDICES)
def test_behaves_as_a_set(one: frozenset[int], other: frozenset[int]) -> None:
    """Members, union, difference and equality are those of Python's sets, whatever the order of making."""
    groups, others = GroupSet.of(one), GroupSet.of(sorted(other, reverse=True))
    assert_same(groups, one)
    assert_same(groups.union(others), one | other)
    assert_same(groups.union(list(other) * 2), one | other)
    assert_same(groups.difference(others), one - other)
    assert (groups == others) == (one == other)
    assert hash(groups.union(others)) == hash(others.union(groups))
    assert_same(groups, one)  # it never changes


def test_groups_in_order_are_one_range() -> None:
    """The usual case stays small: what stands out are the holes."""
    assert GroupSet.of(range(1000)).ranges == ((0, 1000),)
    assert GroupSet.of([5, 0, 1, 3]).ranges == ((0, 2), (3, 4), (5, 6))


@pytest.mark.parametrize("ranges", [((0, 3), (2, 5)), ((0, 3), (3, 5)), ((3, 3),), ((-1, 3),)])
def test_ranges_that_no_set_has_are_refused(ranges: tuple[tuple[int, int], ...]) -> None:
    """Overlapping, touching, empty, negative."""
    with pytest.raises(ValueError, match="ranges ascend and never touch"):
        GroupSet(ranges)
