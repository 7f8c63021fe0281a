"""What has arrived for each step, which of it is trained, and what is filtered out and sampled again. Pure.

A group is decided on when it arrives. In a deterministic job nothing may hang on who comes first: there a step is
admitted whole, and filtered in rounds. A round is over when every seat of the step has its group; those that are
filtered leave their seats to new ones. Only the step that is next to be trained is filtered, so new indices are given
out in one order: to the steps that the policy clock opens, then to the rounds of the step at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from actors.conductor.filtering import GroupFilter
from actors.conductor.issuing import Issuer
from channels.work import GroupReceived


@dataclass(frozen=True, slots=True)
class Decision:
    """Groups of one step: to be trained, and to be discarded, in order."""

    admitted: Sequence[GroupReceived] = ()
    filtered: Sequence[GroupReceived] = ()


@dataclass(slots=True)
class Batch:
    """Of one step: trained, by group; and filtered out, in the order of the decisions."""

    received: dict[int, GroupReceived] = field(default_factory=dict)
    filtered: list[GroupReceived] = field(default_factory=list)

    @property
    def sampled(self) -> list[GroupReceived]:
        """Everything that was sampled for it."""
        return [*self.received.values(), *self.filtered]


class Batches:
    """The steps that are open. Gives the seats of filtered groups back to the issuer."""

    def __init__(self, issuer: Issuer, group_filter: GroupFilter, *, deterministic: bool) -> None:
        self._issuer = issuer
        self._filter = group_filter
        self._deterministic = deterministic
        self._steps: dict[int, Batch] = {}

    def clear(self) -> None:
        """The job went back to a commit."""
        self._steps.clear()

    def arrived(self, group: GroupReceived, step: int) -> Decision:
        """A group of a step is complete, and the issuer knows it. Raises ActorError as `GroupFilter.keeps`."""
        batch = self._steps.setdefault(step, Batch())
        batch.received[group.group] = group
        return self.decide(step) if self._deterministic else self._decide(batch, [group])

    def decide(self, step: int) -> Decision:
        """What can be decided now of a deterministic job's step: nothing, a round, or the whole batch."""
        if not self._deterministic or not self._issuer.is_full(step):
            return Decision()
        # What the policy clock allows comes first, also where the conductor holds it back for a while.
        if self._filter.active and (step != self._issuer.version or self._issuer.owes):
            return Decision()
        batch = self._steps[step]
        decision = self._decide(batch, [batch.received[group] for group in sorted(batch.received)])
        return Decision(filtered=decision.filtered) if decision.filtered else decision

    def close(self, step: int) -> Batch:
        """A step was trained: forget it."""
        return self._steps.pop(step, Batch())

    def in_vain(self, step: int, batch: Batch) -> str | None:
        """Why a job whose step had to take what came is to be ended; None while anything is learned."""
        trained = batch.received.values()
        if not self._filter.active or any(self._filter.keeps(g.rewards, g.info) for g in trained):
            return None
        return self._filter.nothing_left(step, len(trained), [g.rewards for g in batch.filtered])

    def _decide(self, batch: Batch, groups: Sequence[GroupReceived]) -> Decision:
        admitted: list[GroupReceived] = []
        filtered: list[GroupReceived] = []
        for group in groups:
            left = self._filter.most_filtered - len(batch.filtered) - len(filtered)
            kept = not self._filter.active or left <= 0
            kept = kept or self._filter.keeps(group.rewards, group.info)
            (admitted if kept else filtered).append(group)
        for group in filtered:
            self._issuer.discard(group.group)
            del batch.received[group.group]
        batch.filtered += filtered
        return Decision(admitted, filtered)
