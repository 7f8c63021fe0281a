"""A set of group indices that is nearly contiguous: what was trained so far, kept as ranges.

Groups are trained nearly in the order of their indices, so a few ranges say which: what stands out are those that were
discarded or are late. Memory and work go with the number of ranges, never with the number of groups.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GroupSet:
    """Immutable; equal sets have equal ranges.

    ranges: half-open, ascending, neither overlapping nor touching: (0, 96), (97, 128) is 0 to 127 without 96
    """

    ranges: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        end = -1
        for start, stop in self.ranges:
            if not end < start < stop:
                raise ValueError(
                    f"range [{start}, {stop}] after {end}: ranges ascend and never touch"
                )
            end = stop

    @classmethod
    def of(cls, groups: Iterable[int]) -> "GroupSet":
        """Of indices in any order."""
        if isinstance(groups, GroupSet):
            return groups
        return cls(_merged([(group, group + 1) for group in sorted(groups)]))

    def union(self, groups: "Iterable[int] | GroupSet") -> "GroupSet":
        """These and others."""
        others = GroupSet.of(groups)
        return GroupSet(_merged(sorted(self.ranges + others.ranges)))

    def difference(self, groups: "Iterable[int] | GroupSet") -> "GroupSet":
        """These without others."""
        without = GroupSet.of(groups).ranges
        left: list[tuple[int, int]] = []
        position = 0
        for start, stop in self.ranges:
            while position < len(without) and without[position][1] <= start:
                position += 1
            following = position
            while following < len(without) and without[following][0] < stop:
                hole_start, hole_stop = without[following]
                if start < hole_start:
                    left.append((start, hole_start))
                start = hole_stop
                following += 1
            if start < stop:
                left.append((start, stop))
        return GroupSet(tuple(left))

    @property
    def end(self) -> int:
        """One above the highest index; 0 for the empty set."""
        return self.ranges[-1][1] if self.ranges else 0

    def __contains__(self, group: object) -> bool:
        if not isinstance(group, int):
            return False
        position = bisect_right(self.ranges, group, key=lambda pair: pair[0])
        return position > 0 and group < self.ranges[position - 1][1]

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        for start, stop in self.ranges:
            yield from range(start, stop)

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


NO_GROUPS = GroupSet()


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges sorted by their start, which may overlap or touch, as ones that do neither."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)
