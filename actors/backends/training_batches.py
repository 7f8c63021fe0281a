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
    rewards = torch.zeros(len(samples), dtype=torch.float64)
    lengths = torch.zeros(len(samples), dtype=torch.int64)
    parts = [(index[segment.sample], segment, _layout(segment)) for segment in group.segments]
    for place, segment, sequence in parts:
        rewards[place] += segment.episode_return
        lengths[place] += len(sequence.positions)
    advantages = algorithm.advantages(rewards, config).tolist()
    weights = algorithm.weights(lengths, config).tolist()
    return GroupSequences(
        sequences=[
            TrainingSequence(
                tokens=sequence.tokens,
                positions=sequence.positions,
                logprobs=sequence.logprobs,
                sampling=sequence.sampling,
                advantage=advantages[place],
                weight=weights[place],
            )
            for place, _, sequence in parts
            if len(sequence.positions)
        ],
        num_tokens=int(lengths.sum()),
        denominator=algorithm.denominator(lengths, config),
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


def _layout(segment: Segment) -> TrainingSequence:
    tokens: list[NDArray[np.int32]] = []
    positions: list[Int64] = []
    logprobs: list[NDArray[np.float32]] = []
    length = 0
    for turn in segment.turns:
        action = turn.action
        start = length + len(action.prompt)
        kept = np.flatnonzero(action.mask)
        tokens += [action.prompt, action.tokens]
        positions.append(start + kept)
        logprobs.append(action.logprobs[kept])
        length = start + len(action.tokens)
    samplings = {turn.action.sampling for turn in segment.turns if turn.action.mask.any()}
    assert len(samplings) <= 1, f"turns of one segment were sampled in {len(samplings)} ways"
    return TrainingSequence(
        tokens=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate(positions).astype(np.int64),
        logprobs=np.concatenate(logprobs).astype(np.float32),
        sampling=samplings.pop() if samplings else Sampling(),
    )
