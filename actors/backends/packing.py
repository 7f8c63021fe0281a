"""Sequences of a micro-batch one after the other in a row: what a model reads of them, and where each one lies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.backends.training_batches import Float64, TrainingSequence

LIKE = 1.25  # sequences up to so much longer than the shortest are laid side by side


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Neighbours of like length, laid side by side for kernels that want one length.

    first, end: their tokens in the row    rows, width: sequences, and tokens of the longest
    padded: int64 [rows * width], the row's token in each place (padding repeats a sequence's last one)
    packed: int64 [end - first], the place of each token. Both None where all are of one length.
    """

    first: int
    end: int
    rows: int
    width: int
    padded: Tensor | None
    packed: Tensor | None


class Packing:
    """Where the sequences of a row are; attention stays within each.

    lengths: tokens of each, in order. Ascending is fastest.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = tuple(lengths)
        self.starts = (0, *accumulate(lengths))
        self._device = device

    @cached_property
    def positions(self) -> Tensor:
        """int64 [1, tokens], of each token in its sequence."""
        places = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], self.lengths)
        return torch.from_numpy(places[None]).to(self._device, non_blocking=True)

    def offsets(self, count: int) -> Tensor:
        """int32 [count + 1], where the first `count` sequences begin, and the end of the last, on the device."""
        return self._offsets[: count + 1]

    @cached_property
    def _offsets(self) -> Tensor:
        return torch.tensor(self.starts, dtype=torch.int32).to(self._device, non_blocking=True)

    @cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """The whole row, cut into neighbours of like length."""
        cuts = [0]
        for place, length in enumerate(self.lengths):
            shortest = self.lengths[cuts[-1]]
            if not shortest <= length <= LIKE * shortest:
                cuts.append(place)
        return tuple(
            self._rectangle(first, end)
            for first, end in zip(cuts, [*cuts[1:], len(self.lengths)], strict=True)
        )

    def _rectangle(self, first: int, end: int) -> Rectangle:
        lengths = np.array(self.lengths[first:end])
        starts = np.array(self.starts[first:end])
        width = int(lengths.max())
        padded = packed = None
        if lengths.min() < width:
            across = np.arange(width)
            inside = across < lengths[:, None]  # [rows, width]
            places = starts[:, None] + np.minimum(across, lengths[:, None] - 1) - starts[0]
            padded = torch.from_numpy(places.reshape(-1)).to(self._device)
            packed = torch.from_numpy(np.flatnonzero(inside)).to(self._device)
        return Rectangle(self.starts[first], self.starts[end], end - first, width, padded, packed)


class PackedBatch:
    """What the model reads of a micro-batch: sequences of one sampling transform.

    tokens: int64 [1, time]    packing: of its sequences
    places: int64 [trained], of the trained tokens in the row    ends: int64 [sequences], of each one's last token
    rows: int64 [trained], whose each trained token is
    """

    def __init__(self, batch: list[TrainingSequence], device: torch.device) -> None:
        self.sampling = batch[0].sampling
        self.packing = Packing([len(s.tokens) for s in batch], device)
        self._batch = batch
        self._counts = [len(s.positions) for s in batch]
        starts = self.packing.starts
        places = [start + s.positions for start, s in zip(starts, batch, strict=False)]

        def on_device(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        self.tokens = on_device(np.concatenate([s.tokens for s in batch])[None])
        self.places = on_device(np.concatenate(places))
        self.ends = on_device(np.array(starts[1:]) - 1)
        self.rows = on_device(np.repeat(np.arange(len(batch)), self._counts))

    def by_sequence(self, values: Tensor) -> Iterator[tuple[TrainingSequence, Float64]]:
        """Cut what was read for the trained tokens [trained] into that of each sequence, on the host."""
        pieces = np.split(values.double().cpu().numpy(), np.cumsum(self._counts)[:-1])
        return zip(self._batch, pieces, strict=True)
