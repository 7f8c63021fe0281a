"""What is issued when: traces worked by hand, then any history of completions, losses and rollbacks."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.conductor.issuing import Issue, Issuer


def finish_step(issuer: Issuer, groups: list[int]) -> list[int]:
    """All groups of the current step arrive and are trained."""
    for group in groups:
        assert issuer.complete(group) == issuer.version
    assert issuer.is_full(issuer.version)
    return issuer.advance(issuer.version + 1)


def test_on_policy_issues_one_step_at_a_time() -> None:
    """max_staleness = 0: the next groups wait for the version that trains the ones before."""
    issuer = Issuer(groups_per_step=2, max_staleness=0, steps=2)
    assert issuer.due() == [Issue(0, 0, 0), Issue(1, 0, 0)]
    assert issuer.due() == []
    assert finish_step(issuer, [1, 0]) == [0, 1]
    assert issuer.due() == [Issue(2, 1, 1), Issue(3, 1, 1)]
    assert finish_step(issuer, [2, 3]) == [2, 3]
    assert issuer.due() == [], "nothing is issued beyond the last step"
    assert issuer.in_flight == 0


def test_one_step_ahead() -> None:
    """max_staleness = 1: step 1's groups are sampled with version 0 while step 0 is trained."""
    issuer = Issuer(groups_per_step=2, max_staleness=1, steps=4)
    assert issuer.due() == [Issue(0, 0, 0), Issue(1, 0, 0), Issue(2, 1, 0), Issue(3, 1, 0)]
    assert finish_step(issuer, [0, 1]) == [0, 1]
    assert issuer.due() == [Issue(4, 2, 1), Issue(5, 2, 1)]
    assert finish_step(issuer, [2, 3]) == [2, 3]
    assert issuer.due() == [Issue(6, 3, 2), Issue(7, 3, 2)]
    assert finish_step(issuer, [4, 5]) == [4, 5]
    assert issuer.due() == []
    assert issuer.unfinished == [6, 7]


def test_two_steps_ahead() -> None:
    """max_staleness = 2: three steps' groups are out, never four."""
    issuer = Issuer(groups_per_step=1, max_staleness=2, steps=9)
    assert issuer.due() == [Issue(0, 0, 0), Issue(1, 1, 0), Issue(2, 2, 0)]
    # Later steps may be complete before the first one is: the clock goes by steps.
    assert issuer.complete(2) == 2
    assert issuer.due() == []
    assert finish_step(issuer, [0]) == [0]
    assert issuer.due() == [Issue(3, 3, 1)]
    assert finish_step(issuer, [1]) == [1]
    assert issuer.is_full(2)
    assert issuer.advance(3) == [2]
    assert issuer.due() == [Issue(4, 4, 2 + 1), Issue(5, 5, 3)]


def test_a_job_shorter_than_its_bound() -> None:
    """Of a job of 2 steps no more than 2 steps are issued, however large the bound."""
    issuer = Issuer(groups_per_step=3, max_staleness=5, steps=2)
    assert [issue.group for issue in issuer.due()] == [0, 1, 2, 3, 4, 5]


def test_a_duplicate_is_not_awaited() -> None:
    """The second arrival of a group, and one after its step, have no step."""
    issuer = Issuer(groups_per_step=1, max_staleness=0, steps=2)
    issuer.due()
    assert issuer.complete(7) is None, "never issued"
    assert issuer.complete(0) == 0
    assert issuer.complete(0) is None
    issuer.advance(1)
    assert issuer.complete(0) is None
    assert issuer.seat(0) is None


def test_a_discarded_group_gives_its_seat_to_a_new_index() -> None:
    """The seat stays in its step; the index is never used again."""
    issuer = Issuer(groups_per_step=2, max_staleness=1, steps=3)
    issuer.due()
    issuer.complete(1)
    issuer.discard(1)
    assert issuer.due() == [Issue(4, 0, 0)]
    assert not issuer.is_full(0)
    assert finish_step(issuer, [0, 4]) == [0, 4]


def test_restore_issues_again_what_the_commit_does_not_contain() -> None:
    """After a rollback to step 1 the lost indices come first, in order, then new ones."""
    issuer = Issuer(groups_per_step=2, max_staleness=1, steps=9)
    issuer.due()
    finish_step(issuer, [0, 1])
    issuer.due()
    finish_step(issuer, [2, 3])
    issuer.complete(4)
    issuer.restore(1, next_group=6, reissue=[5, 2, 4, 3])
    assert not issuer.has_arrived(1)
    assert issuer.complete(2) is None, "what was in flight before is not awaited"
    assert issuer.due() == [Issue(2, 1, 1), Issue(3, 1, 1), Issue(4, 2, 1), Issue(5, 2, 1)]
    assert finish_step(issuer, [2, 3]) == [2, 3]
    assert issuer.due() == [Issue(6, 3, 2), Issue(7, 3, 2)]


def test_versions_come_one_by_one() -> None:
    """A version that was skipped or repeated is refused: two trainers would be at work."""
    issuer = Issuer(groups_per_step=1, max_staleness=0, steps=3)
    with pytest.raises(ValueError, match="version 2 after 0"):
        issuer.advance(2)


class Histories(RuleBasedStateMachine):
    """Any order of completions, duplicates, discards, steps and rollbacks."""

    @initialize(
        groups_per_step=st.integers(1, 4),
        max_staleness=st.integers(0, 3),
        steps=st.integers(1, 6),
        commit_every=st.integers(1, 3),
    )
    def begin(
        self, groups_per_step: int, max_staleness: int, steps: int, commit_every: int
    ) -> None:
        self.size, self.bound, self.steps = groups_per_step, max_staleness, steps
        self.commit_every = commit_every
        self.issuer = Issuer(
            groups_per_step=groups_per_step, max_staleness=max_staleness, steps=steps
        )
        self.issued: dict[int, Issue] = {}  # in flight: not arrived
        self.arrived: dict[int, Issue] = {}
        self.trained: dict[int, int] = {}  # group → step
        self.discarded: set[int] = set()
        self.highest = -1
        self.committed = (0, dict[int, int]())  # step, what was trained by then
        self.issue()

    def issue(self) -> None:
        expected_new = self.highest + 1
        for issue in self.issuer.due():
            assert issue.group not in self.issued
            assert issue.group not in self.arrived
            assert issue.group not in self.trained
            assert issue.group not in self.discarded
            if issue.group > self.highest:
                assert issue.group == expected_new, "indices are given without gaps"
                expected_new += 1
                self.highest = issue.group
            assert issue.version == self.issuer.version
            # Whatever samples it has at least this version, and its step trains it.
            assert 0 <= issue.step - issue.version <= self.bound
            assert issue.step < self.steps
            self.issued[issue.group] = issue
        assert self.issuer.due() == []

    @precondition(lambda self: self.issued)
    @rule(data=st.data())
    def arrives(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted(self.issued)))
        issue = self.issued.pop(group)
        assert self.issuer.complete(group) == issue.step
        self.arrived[group] = issue

    @rule(group=st.integers(0, 40))
    def arrives_twice_or_unasked(self, group: int) -> None:
        if group not in self.issued:
            assert self.issuer.complete(group) is None

    @precondition(lambda self: self.issued or self.arrived)
    @rule(data=st.data())
    def is_discarded(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(sorted({**self.issued, **self.arrived})))
        step = self.issuer.seat(group)
        self.issuer.discard(group)
        self.issued.pop(group, None)
        self.arrived.pop(group, None)
        self.discarded.add(group)
        before = set(self.issued)
        self.issue()
        (replacement,) = set(self.issued) - before
        assert self.issued[replacement].step == step

    @precondition(lambda self: self.issuer.is_full(self.issuer.version))
    @rule()
    def trains(self) -> None:
        step = self.issuer.version
        groups = self.issuer.advance(step + 1)
        assert groups == sorted(g for g, issue in self.arrived.items() if issue.step == step)
        assert len(groups) == self.size
        for group in groups:
            assert group not in self.trained
            lag = step - self.arrived.pop(group).version
            assert lag <= self.bound
            self.trained[group] = step
        if self.issuer.version % self.commit_every == 0:
            self.committed = (self.issuer.version, dict(self.trained))
        self.issue()

    @rule()
    def rolls_back(self) -> None:
        step, trained = self.committed
        self.trained = dict(trained)
        self.issued.clear()
        self.arrived.clear()
        lost = [
            group
            for group in range(self.highest + 1)
            if group not in self.trained and group not in self.discarded
        ]
        self.issuer.restore(step, self.highest + 1, reversed(lost))
        before = self.highest
        self.issue()
        new = [group for group in self.issued if group > before]
        assert not new or set(lost) <= set(self.issued), "old indices come before new ones"

    @invariant()
    def every_seat_is_accounted_for(self) -> None:
        if not hasattr(self, "issuer"):
            return
        assert self.issuer.unfinished == sorted({**self.issued, **self.arrived})
        assert self.issuer.in_flight <= self.size * (self.bound + 1)
        open_steps = min(self.bound + 1, self.steps - self.issuer.version)
        assert self.issuer.in_flight == self.size * open_steps
        per_step = [list(self.trained.values()).count(s) for s in range(self.issuer.version)]
        assert per_step == [self.size] * self.issuer.version


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_any_history_keeps_the_bound = Histories.TestCase
