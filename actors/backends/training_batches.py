"""What a training engine feeds to a model: groups become sequences, sequences micro-batches. No model.

A sequence is one segment as the model reads it: the concatenation over its turns of prompt and sampled tokens. Only
sampled tokens with a valid mask carry loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from actors.algorithms import aggregation, kl
from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Algorithm, Episodes
from actors.algorithms.rewards import soft_overlong_penalty
from actors.episodes import Action, Group, Sampling, Segment

REFERENCE = "reference"  # in what inference actors computed
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


def _nothing() -> Float64:
    return np.zeros(0)


@dataclass(slots=True, kw_only=True)
class TrainingSequence:
    """One segment and what its tokens count. `trained` are the tokens that carry loss.

    segment: what it was made of    length: tokens of the context, or units (of a policy that acts on arrays)
    tokens: int64 [length], empty where the policy has none    positions: int64 [trained], places in the context
    logprobs: float32 [trained], the sampler's    versions: int32 [trained], its policy's
    turns: int64 [trained], which turn of the segment    rewards: [trained], a turn's at its last trained token
    group: its number in the job    sample: its place in `GroupsLaidOut.returns`

    Filled in later: advantages, weights: [trained]; where there is a critic returns, values (before the update) and
    last_value, at the end of the sequence; proximal, reference: log-probs [trained] of those policies, if asked for.
    Where inference actors gave proximal or values, read_by is the version that they are of
    """

    segment: Segment
    length: int
    tokens: Int64
    positions: Int64
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    turns: Int64
    rewards: Float64
    sampling: Sampling
    group: int
    sample: int
    advantages: Float64 = field(default_factory=_nothing)
    weights: Float64 = field(default_factory=_nothing)
    returns: Float64 | None = None
    values: Float64 | None = None
    last_value: float = 0.0
    proximal: Float64 | None = None
    reference: Float64 | None = None
    read_by: int | None = None


@dataclass(slots=True)
class GroupsLaidOut:
    """Complete groups: the sequences that have trained tokens, adjacent by group and sample, and their samples.

    numbers: of the groups in the job    groups: [samples], each one's place in `numbers`
    returns: [samples]    sampled: [samples], tokens sampled, trained or not    ended: [samples], episodes that had
    denominators: [groups], what each adds to that of the update; filled in with the targets
    """

    sequences: list[TrainingSequence]
    numbers: list[int]
    groups: list[int]
    returns: list[float]
    sampled: list[int]
    ended: list[bool]
    denominators: Float64 = field(default_factory=_nothing)


def lay_out(groups: Sequence[Group]) -> GroupsLaidOut:
    """Samples are compared by their whole return, also where an episode came in several segments."""
    laid_out = GroupsLaidOut([], [], [], [], [], [])
    for place, group in enumerate(groups):
        laid_out.numbers.append(group.group)
        sample: int | None = None
        earlier: TrainingSequence | None = None  # of the same sample
        for segment in sorted(group.segments, key=lambda s: (s.sample, s.first_turn)):
            if segment.sample != sample:
                sample, earlier = segment.sample, None
                laid_out.groups.append(place)
                laid_out.returns.append(0.0)
                laid_out.sampled.append(0)
                laid_out.ended.append(True)
            laid_out.returns[-1] += segment.episode_return
            laid_out.sampled[-1] += segment.num_tokens
            laid_out.ended[-1] = segment.terminated
            sequence, before = _sequence(segment, group.group, len(laid_out.returns) - 1)
            if earlier is not None:
                earlier.rewards[-1] += before
            if sequence is not None:
                laid_out.sequences.append(sequence)
                earlier = sequence
    return laid_out


def set_targets(
    laid_out: GroupsLaidOut, algorithm: Algorithm, config: AlgorithmConfig, *, critic: bool
) -> None:
    """Advantages (not normalised by the batch), weights, value targets and denominators."""
    penalties = soft_overlong_penalty(torch.tensor(laid_out.sampled), config).tolist()
    returns = np.add(laid_out.returns, penalties)
    last_values = np.zeros(len(returns))
    last = -1
    for sequence in reversed(laid_out.sequences):
        if sequence.sample != last:  # the sample's last one
            last = sequence.sample
            sequence.rewards[-1] += penalties[last]
            if not laid_out.ended[last]:
                last_values[last] = sequence.last_value
    sequences = laid_out.sequences
    rewards = _flat([s.rewards for s in sequences])
    counts = [len(s.positions) for s in sequences]
    samples = torch.from_numpy(np.repeat([s.sample for s in sequences], counts).astype(np.int64))
    if config.kl_coefficient and config.kl_place == "reward":
        penalty = config.kl_coefficient * kl.estimate(
            _flat([s.logprobs for s in sequences]),
            _flat([s.reference for s in sequences if s.reference is not None]),
            config.kl_estimator or "k1",
        )
        rewards = rewards - penalty
        returns -= torch.zeros(len(returns)).double().index_add(0, samples, penalty).numpy()
    episodes = Episodes(
        returns=torch.from_numpy(returns),
        groups=torch.tensor(laid_out.groups, dtype=torch.int64),
        samples=samples,
        turns=turn_numbers(sequences),
        rewards=rewards,
        values=_flat([s.values for s in sequences if s.values is not None]) if critic else None,
        last_values=torch.from_numpy(last_values) if critic else None,
    )
    targets = algorithm.advantages(episodes, config)
    advantages = targets.advantages.numpy()
    weights = aggregation.weights(episodes, config).numpy()
    values = None if targets.returns is None else targets.returns.numpy()
    start = 0
    for sequence, count in zip(sequences, counts, strict=True):
        mine = slice(start, start + count)
        sequence.advantages, sequence.weights = advantages[mine], weights[mine]
        if values is not None:
            sequence.returns = values[mine]
        start += count
    laid_out.denominators = aggregation.denominators(episodes, config).numpy()


def turn_numbers(sequences: Sequence[TrainingSequence]) -> torch.Tensor:
    """Which turn of all sequences each trained token belongs to, without gaps. int64 [tokens]"""
    if not sequences:
        return torch.zeros(0, dtype=torch.int64)
    turns = np.concatenate([s.turns for s in sequences])
    new = np.ones(len(turns), dtype=np.bool_)
    new[1:] = turns[1:] != turns[:-1]
    new[np.cumsum([len(s.turns) for s in sequences[:-1]], dtype=np.int64)] = True
    return torch.from_numpy(np.cumsum(new) - 1)


def micro_batches(
    sequences: Sequence[TrainingSequence], budget_tokens: int
) -> Iterator[list[TrainingSequence]]:
    """Cut sequences into micro-batches of one sampling transform and at most `budget_tokens`.

    Shortest first, so that those side by side are alike; a sequence longer than the budget comes alone.
    """
    by_sampling: dict[Sampling, list[TrainingSequence]] = {}
    for sequence in sequences:
        by_sampling.setdefault(sequence.sampling, []).append(sequence)
    for alike in by_sampling.values():
        batch: list[TrainingSequence] = []
        tokens = 0
        for sequence in sorted(alike, key=lambda s: s.length):
            if batch and tokens + sequence.length > budget_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(sequence)
            tokens += sequence.length
        yield batch


def _flat(arrays: Sequence[NDArray[np.floating]]) -> torch.Tensor:
    """One after the other, in float64."""
    if not arrays:
        return torch.zeros(0, dtype=torch.float64)
    return torch.from_numpy(np.concatenate(arrays, dtype=np.float64))


def _sequence(segment: Segment, group: int, sample: int) -> tuple[TrainingSequence | None, float]:
    """None where no token is trained; and what was earned before the first trained token, if anything."""
    actions = [turn.action for turn in segment.turns]
    positions: list[Int64] = []
    length = 0
    for action in actions:
        start = length + len(action.prompt)
        positions.append(start + np.flatnonzero(action.mask))
        length = start + action.num_units
    counts = [len(each) for each in positions]
    if not sum(counts):
        return None, segment.episode_return
    rewards = np.zeros(sum(counts))
    before, place = 0.0, 0
    for turn, trained in zip(segment.turns, counts, strict=True):
        place += trained
        if place:
            rewards[place - 1] += turn.reward
        else:
            before += turn.reward
    sequence = TrainingSequence(
        segment=segment,
        length=length,
        tokens=np.concatenate([p for a in actions for p in (a.prompt, a.tokens)], dtype=np.int64),
        positions=np.concatenate(positions) if len(positions) > 1 else positions[0],
        logprobs=np.concatenate([a.logprobs[a.mask] for a in actions], dtype=np.float32),
        versions=np.concatenate([a.versions[a.mask] for a in actions], dtype=np.int32),
        turns=np.repeat(np.arange(len(counts)), counts),
        rewards=rewards,
        sampling=_sampling(actions),
        group=group,
        sample=sample,
        reference=_computed(segment, REFERENCE),
    )
    if (reading := segment.reading) is not None:
        sequence.read_by = reading.version
        if reading.proximal is not None:
            sequence.proximal = reading.proximal.astype(np.float64)
        if reading.values is not None:
            sequence.values = reading.values.astype(np.float64)
            sequence.last_value = reading.last_value
    return sequence, before


def _computed(segment: Segment, name: str) -> Float64 | None:
    """[trained], what inference actors said of the trained tokens; None if nobody asked them."""
    if any(name not in turn.computed for turn in segment.turns):
        return None
    found = [turn.computed[name][turn.action.mask] for turn in segment.turns]
    return np.concatenate(found, dtype=np.float64)


def _sampling(actions: Sequence[Action]) -> Sampling:
    samplings = {action.sampling for action in actions if action.mask.any()}
    assert len(samplings) == 1, f"turns of one segment were sampled in {len(samplings)} ways"
    return samplings.pop()
