"""Advantages normalised over the batch of a step: the trained tokens of all ranks."""

from collections.abc import Sequence

import torch

from actors.algorithms.estimates import normalize_by_batch
from actors.backends.ranks import Ranks
from actors.backends.training_batches import TrainingSequence


def normalize(sequences: Sequence[TrainingSequence], ranks: Ranks) -> None:
    """By mean and deviation, in place; in two passes, so that nothing cancels out. Collective."""
    advantages = torch.cat(
        [torch.zeros(0, dtype=torch.float64)]
        + [torch.from_numpy(sequence.advantages) for sequence in sequences]
    )
    moments = torch.stack([torch.tensor(float(len(advantages))).double(), advantages.sum()])
    count, total = ranks.sum_on_host(moments).tolist()
    mean = total / max(count, 1.0)
    squares = ranks.sum_on_host((advantages - mean).square().sum())
    std = float(squares / max(count, 1.0)) ** 0.5
    normalized = normalize_by_batch(advantages, mean, std).split(
        [len(sequence.advantages) for sequence in sequences]
    )
    for sequence, values in zip(sequences, normalized, strict=False):
        sequence.advantages = values.numpy()
