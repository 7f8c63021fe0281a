"""What the conductor decides: which groups may be issued at which policy version, and which step trains them.

The policy clock counts trainer steps: version v is what came out of step v - 1, version 0 is where the job began.
Every group has a seat, the step that will train it; seats are given in order of issue, `groups_per_step` a step. A
group with a seat in step s is issued once version s - max_staleness is out, so whatever it is sampled with lags at most
`max_staleness` versions when it is trained: the bound holds by construction and nothing is thrown away for being stale.

    max_staleness = 0, 2 groups a step          max_staleness = 1
    version 0: issue g0 g1                      version 0: issue g0 g1 (step 0), g2 g3 (step 1)
    step 0 trains g0 g1, version 1 comes out    step 0 trains g0 g1 while g2 g3 are sampled
    version 1: issue g2 g3                      version 1: issue g4 g5 (step 2) while step 1 trains g2 g3

A group that is lost (its env actor died before it was delivered) keeps its index and its seat and is played again by
whoever takes its ticket. A group that is discarded gives its seat to a new index. Pure: no clock, no sockets.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Issue:
    """A group to issue now: play it with a policy of at least `version`; `step` will train it."""

    group: int
    step: int
    version: int


class Issuer:
    """Keeps seats. `open_steps`: the job's number of steps; nothing is issued beyond the last one."""

    def __init__(self, *, groups_per_step: int, max_staleness: int, steps: int) -> None:
        self.groups_per_step = groups_per_step
        self.max_staleness = max_staleness
        self.steps = steps
        self.version = 0
        self._next_group = 0
        self._reissue: deque[int] = deque()
        self._seats: dict[int, int] = {}  # group → step, of everything issued and not trained
        self._seated: dict[int, int] = {}  # step → seats given
        self._completed: dict[int, set[int]] = {}  # step → completed groups

    def restore(self, version: int, next_group: int, reissue: Iterable[int]) -> None:
        """Start over at a commit: `reissue` are the indices below `next_group` that it does not contain."""
        self.version = version
        self._next_group = next_group
        self._reissue = deque(sorted(reissue))
        self._seats.clear()
        self._seated.clear()
        self._completed.clear()

    def due(self) -> list[Issue]:
        """Groups that may be issued now, in order; they count as issued from here on."""
        issues = []
        for step in self._open_steps:
            while self._seated.get(step, 0) < self.groups_per_step:
                if self._reissue:
                    group = self._reissue.popleft()
                else:
                    group = self._next_group
                    self._next_group += 1
                self._seats[group] = step
                self._seated[step] = self._seated.get(step, 0) + 1
                issues.append(Issue(group, step, self.version))
        return issues

    @property
    def owes(self) -> bool:
        """Whether `due` would give any."""
        return any(self._seated.get(step, 0) < self.groups_per_step for step in self._open_steps)

    @property
    def _open_steps(self) -> range:
        return range(self.version, min(self.version + self.max_staleness, self.steps - 1) + 1)

    def seat(self, group: int) -> int | None:
        """The step that will train a group, or None when it has no seat (never issued, or trained)."""
        return self._seats.get(group)

    def complete(self, group: int) -> int | None:
        """A group arrived at the trainer. Returns its step, or None when it is not awaited (a duplicate)."""
        step = self._seats.get(group)
        if step is None or group in self._completed.setdefault(step, set()):
            return None
        self._completed[step].add(group)
        return step

    def is_full(self, step: int) -> bool:
        """Whether all groups of a step have arrived."""
        return len(self._completed.get(step, ())) == self.groups_per_step

    def has_arrived(self, step: int) -> bool:
        """Whether any group of a step has arrived: its training may have begun."""
        return bool(self._completed.get(step))

    def discard(self, group: int) -> None:
        """The group will not be trained; its seat is free for a new index, issued by the next `due`."""
        step = self._seats.pop(group)
        self._seated[step] -= 1
        self._completed.get(step, set()).discard(group)

    def advance(self, version: int) -> list[int]:
        """Version v is out: step v - 1 was trained. Returns its groups."""
        if version != self.version + 1:
            raise ValueError(f"version {version} after {self.version}: versions come one by one")
        self.version = version
        self._seated.pop(version - 1, None)
        groups = sorted(self._completed.pop(version - 1, ()))
        for group in groups:
            del self._seats[group]
        return groups

    @property
    def in_flight(self) -> int:
        """Groups issued and not trained."""
        return len(self._seats)

    @property
    def unfinished(self) -> list[int]:
        """Groups issued and not trained, in order."""
        return sorted(self._seats)
