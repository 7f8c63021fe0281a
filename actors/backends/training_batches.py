"""What a training engine feeds to a model: groups become sequences, sequences micro-batches. numpy only, no model.

A sequence is one segment as the model reads it: the concatenation over its turns of prompt and sampled tokens. Only
sampled tokens with a valid mask carry loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Algorithm
from actors.episodes import Group, Sampling, Segment

Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One segment and what its tokens count.

    tokens: int64 [length]    positions: int64 [trained], places in `tokens` of those that carry loss, each at least 1
    logprobs: float32 [trained], the sampler's    advantage, weight: of each trained token
    """

    tokens: Int64
    positions: Int64
    logprobs: NDArray[np.float32]
    sampling: Sampling
    advantage: float = 0.0
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupSequences:
    """The sequences of a group that have trained tokens, and what the group adds to the step's denominators."""

    sequences: list[TrainingSequence]
    num_tokens: int
    denominator: float


def group_sequences(group: Group, algorithm: Algorithm, config: AlgorithmConfig) -> GroupSequences:
    """Lay a group out. Samples are compared by their whole return, also where an episode came in several segments."""
    samples = sorted({segment.sample for segment in group.segments})
    index = {sample: place for place, sample in enumerate(samples)}
    rewards, lengths = [0.0] * len(samples), [0] * len(samples)
    positions = [_trained_positions(segment) for segment in group.segments]
    for segment, trained in zip(group.segments, positions, strict=True):
        rewards[index[segment.sample]] += segment.episode_return
        lengths[index[segment.sample]] += len(trained)
    tokens = torch.tensor(lengths)
    advantages = algorithm.advantages(torch.tensor(rewards, dtype=torch.float64), config).tolist()
    weights = algorithm.weights(tokens, config).tolist()
    return GroupSequences(
        sequences=[
            _sequence(segment, trained, advantages[place], weights[place])
            for segment, trained in zip(group.segments, positions, strict=True)
            if len(trained)
            for place in (index[segment.sample],)
        ],
        num_tokens=sum(lengths),
        denominator=algorithm.denominator(tokens, config),
    )


def micro_batches(
    sequences: Sequence[TrainingSequence], budget_tokens: int
) -> Iterator[list[TrainingSequence]]:
    """Cut sequences into micro-batches of one sampling transform and at most `budget_tokens` with padding.

    Shortest first, so that little is padded; a sequence longer than the budget comes alone.
    """
    by_sampling: dict[Sampling, list[TrainingSequence]] = {}
    for sequence in sequences:
        by_sampling.setdefault(sequence.sampling, []).append(sequence)
    for alike in by_sampling.values():
        batch: list[TrainingSequence] = []
        for sequence in sorted(alike, key=lambda s: len(s.tokens)):
            if batch and len(sequence.tokens) * (len(batch) + 1) > budget_tokens:
                yield batch
                batch = []
            batch.append(sequence)
        yield batch


def _trained_positions(segment: Segment) -> Int64:
    """Where the sampled tokens with a valid mask lie in the segment's sequence."""
    positions: list[Int64] = []
    length = 0
    for turn in segment.turns:
        start = length + len(turn.action.prompt)
        positions.append(start + np.flatnonzero(turn.action.mask))
        length = start + len(turn.action.tokens)
    return np.concatenate(positions) if len(positions) > 1 else positions[0]


def _sequence(
    segment: Segment, positions: Int64, advantage: float, weight: float
) -> TrainingSequence:
    actions = [turn.action for turn in segment.turns]
    samplings = {action.sampling for action in actions if action.mask.any()}
    assert len(samplings) == 1, f"turns of one segment were sampled in {len(samplings)} ways"
    parts = [part for action in actions for part in (action.prompt, action.tokens)]
    logprobs = [action.logprobs[action.mask] for action in actions]
    return TrainingSequence(
        tokens=np.concatenate(parts, dtype=np.int64),
        positions=positions,
        logprobs=np.concatenate(logprobs, dtype=np.float32),
        sampling=samplings.pop(),
        advantage=advantage,
        weight=weight,
    )
