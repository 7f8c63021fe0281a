"""Dynamic sampling: which groups are kept, when a step takes what comes; no order of arrival changes what is issued."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.algorithms.config import AlgorithmConfig
from actors.conductor.batches import Batch, Batches, Decision
from actors.conductor.filtering import GroupFilter, can_teach
from actors.conductor.issuing import Issuer
from actors.errors import ActorError
from channels.work import GroupReceived


def group_filter(groups_per_step: int = 4, **changes: object) -> GroupFilter:
    return GroupFilter(AlgorithmConfig(**changes), groups_per_step)  # type: ignore[arg-type]


def received(group: int, rewards: list[float]) -> GroupReceived:
    return GroupReceived(
        group=group,
        attempt=0,
        run_attempt=0,
        min_version=0,
        max_version=0,
        tokens=1,
        rewards=rewards,
        info={},
    )


def test_a_group_can_teach_where_its_samples_differ() -> None:
    """DAPO, equation 11, also for rewards that are not 0 or 1."""
    assert can_teach([0, 1, 0])
    assert can_teach([0.2, 0.1])
    assert not any(map(can_teach, ([], [1.0], [0, 0, 0], [1, 1], [0.3] * 4)))


def test_only_dapo_samples_again_unless_told() -> None:
    """It is part of that paper; any other algorithm may ask for it, and DAPO may go without."""
    assert group_filter(name="dapo").active
    assert not group_filter(name="dapo", dynamic_sampling=False).active
    assert not group_filter().active
    assert group_filter(name="ppo", dynamic_sampling=True).active


def test_a_range_leaves_out_what_is_too_hard_or_too_easy() -> None:
    """Of the mean reward, bounds included; alone it says nothing about equal rewards."""
    banded = group_filter(filter_range=(0.25, 0.75))
    kept = [banded.keeps([1.0] * right + [0.0] * (4 - right), {}) for right in range(5)]
    assert kept == [False, True, True, True, False]
    assert banded.keeps([0.5, 0.5], {})
    assert not group_filter(filter_range=(0.25, 0.75), dynamic_sampling=True).keeps([0.5, 0.5], {})


def test_a_range_may_be_about_a_number_of_the_task() -> None:
    """Accuracy, say, where the reward has other parts; one that the task does not give is told."""
    by_accuracy = group_filter(filter_range=(0.1, 0.9), filter_key="correct")
    assert by_accuracy.keeps([7.0, 9.0], {"correct": 0.5})
    assert not by_accuracy.keeps([7.0, 9.0], {"correct": 1.0})
    with pytest.raises(ActorError, match=r'filter_key = "correct".*use reward, length'):
        by_accuracy.keeps([7.0], {"length": 3.0})


def batches(**changes: object) -> tuple[Issuer, Batches]:
    issuer = Issuer(groups_per_step=2, max_staleness=0, steps=9)
    config = group_filter(2, dynamic_sampling=True, **changes)
    return issuer, Batches(issuer, config, deterministic=False)


@pytest.mark.parametrize(("rounds", "left_out"), [(1, 0), (3, 4)])
def test_a_step_takes_what_comes_after_its_rounds(rounds: int, left_out: int) -> None:
    """3 rounds of 2 groups are 6 sampled: 4 may be left out, and the last two fill the batch, useful or not."""
    issuer, made = batches(max_sampling_rounds=rounds)
    admitted: list[int] = []
    for group in range(2 * rounds):
        issuer.due()
        step = issuer.complete(group)
        assert step == 0
        decision = made.arrived(received(group, [1.0, 1.0]), step)
        assert len(decision.filtered) == (group < left_out)
        admitted += [each.group for each in decision.admitted]
    assert admitted == [left_out, left_out + 1]
    assert issuer.is_full(0)
    assert not issuer.due()


def test_a_step_without_anything_useful_is_told() -> None:
    """How many were sampled, and what their rewards were; one useful group is enough to go on."""
    _, made = batches(max_sampling_rounds=2)
    useless = [received(group, [1.0, 1.0]) for group in range(4)]
    batch = Batch({group.group: group for group in useless[2:]}, useless[:2])
    reason = made.in_vain(7, batch)
    assert reason is not None
    assert "step 7: not one of 4 groups" in reason
    assert "(2 of those left out had one reward for all samples, always 1)" in reason
    batch.filtered[0] = received(0, [0.0, 0.0])
    mixed = made.in_vain(7, batch)
    assert mixed is not None
    assert "for all samples)" in mixed
    batch.received[2] = received(2, [0.0, 1.0])
    assert made.in_vain(7, batch) is None


class Run:
    """A deterministic job's issuer and batches; groups teach or not by their index, and come in any order."""

    def __init__(self, size: int, bound: int, steps: int, useful: list[bool], rounds: int) -> None:
        self.issuer = Issuer(groups_per_step=size, max_staleness=bound, steps=steps)
        config = AlgorithmConfig(dynamic_sampling=True, max_sampling_rounds=rounds)
        self.batches = Batches(self.issuer, GroupFilter(config, size), deterministic=True)
        self.useful = useful
        self.flying: list[int] = []
        self.filtered: dict[int, int] = {}  # group → step
        self.trained: dict[int, list[int]] = {}
        self.held = False  # as while an evaluation is taken
        self.issue()

    def issue(self) -> None:
        if not self.held:
            self.flying += [issue.group for issue in self.issuer.due()]

    def carry_out(self, decision: Decision, step: int) -> None:
        assert not (decision.admitted and decision.filtered)
        self.filtered |= {group.group: step for group in decision.filtered}
        if decision.filtered:
            self.issue()
        if decision.admitted:
            self.trained[step] = [group.group for group in decision.admitted]
            assert step == self.issuer.version

    def arrives(self, group: int) -> None:
        self.flying.remove(group)
        step = self.issuer.complete(group)
        assert step is not None
        teaches = self.useful[group % len(self.useful)]
        rewards = [0.0, 1.0] if teaches else [1.0, 1.0]
        self.carry_out(self.batches.arrived(received(group, rewards), step), step)
        self.goes_on()

    def goes_on(self) -> None:
        self.issue()
        self.carry_out(self.batches.decide(self.issuer.version), self.issuer.version)
        if self.issuer.version in self.trained:
            self.issuer.advance(self.issuer.version + 1)
            self.batches.close(self.issuer.version - 1)
            self.goes_on()

    def in_weights(self) -> set[int]:
        return {group for groups in self.trained.values() for group in groups}

    def rolls_back(self, step: int) -> None:
        """As the ledger reconciles: what was trained, or filtered out, before that step stays."""
        highest = max({*self.issuer.unfinished, *self.filtered, *self.in_weights()})
        self.trained = {s: groups for s, groups in self.trained.items() if s < step}
        self.filtered = {group: s for group, s in self.filtered.items() if s < step}
        done = {*self.filtered, *self.in_weights()}
        self.batches.clear()
        self.issuer.restore(step, highest + 1, [g for g in range(highest + 1) if g not in done])
        self.flying = []
        self.issue()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_neither_order_nor_waits_nor_rollbacks_change_a_deterministic_job(
    data: st.DataObject,
) -> None:
    """Which groups each step trains, and which are filtered, is that of a run where all come in order, at once."""
    size, bound = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
    useful = data.draw(st.lists(st.booleans(), min_size=1, max_size=9).filter(any))
    steps, rounds = 4, data.draw(st.integers(0, 3))
    calm = Run(size, bound, steps, useful, rounds)
    while calm.flying:
        calm.arrives(min(calm.flying))
    trained = [g for groups in calm.trained.values() for g in groups]
    assert rounds or all(useful[g % len(useful)] for g in trained)
    assert not rounds or max(trained) < rounds * size * steps
    assert [len(groups) for groups in calm.trained.values()] == [size] * steps
    run = Run(size, bound, steps, useful, rounds)
    crashes = data.draw(st.integers(0, 3))
    while run.flying or run.held:
        if crashes and data.draw(st.booleans()):
            crashes -= 1
            run.held = False
            run.rolls_back(data.draw(st.integers(0, run.issuer.version)))
        if run.flying:
            run.arrives(data.draw(st.sampled_from(run.flying)))
        run.held = bool(run.flying) and data.draw(st.booleans())
        run.goes_on()
    assert (run.trained, run.filtered) == (calm.trained, calm.filtered)
