"""The reference policy on a transformers causal LM: frozen, and read the way the training engine reads its own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.backends.packing import PackedBatch
from actors.backends.token_logprobs import TokenLogprobs
from actors.backends.training_batches import REFERENCE, lay_out, micro_batches
from actors.episodes import Float32, Group, Segment, Turn
from actors.trainer.config import TrainerConfig

HOST = torch.device("cpu")


class HFReferenceEngine:
    """`ReferenceEngine` of actors.backends.contract. Moves `model` to `device` and from then on owns it."""

    def __init__(self, model: Any, *, config: TrainerConfig, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._model = model.to(self._device).eval().requires_grad_(False)
        self._config = config
        self._dtype = next(model.parameters()).dtype
        if config.dtype == "bfloat16":  # as the trainer computes; buffers stay as they are there
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        self._logprobs = TokenLogprobs(self._model)
        self._resident = True

    @torch.no_grad()
    def read(self, group: Group) -> Group:
        """See the contract. Where a token is not trained, the log-prob is 0."""
        sequences = lay_out([group]).sequences
        found: dict[int, NDArray[np.float64]] = {}
        for batch in micro_batches(sequences, self._config.micro_batch_tokens):
            packed = PackedBatch(batch, self._device)
            read = self._logprobs(packed, self._dtype)
            for sequence, values in packed.by_sequence(read.logprobs):
                found[id(sequence)] = values
        # Sequences come in this order, and only of segments that have trained tokens.
        left = iter([found[id(sequence)] for sequence in sequences])
        segments = []
        for segment in sorted(group.segments, key=lambda s: (s.sample, s.first_turn)):
            trained = any(turn.action.mask.any() for turn in segment.turns)
            values = next(left) if trained else np.zeros(0)
            segments.append(replace(segment, turns=tuple(_turns(segment, values))))
        return replace(group, segments=tuple(segments))

    def offload(self) -> None:
        """The weights to the host. On CPU they stay: device and host are one."""
        self._model.to(HOST)
        if self._device.type != "cpu":
            torch.cuda.empty_cache()
        self._resident = False

    def onload(self) -> None:
        """The weights to the device."""
        self._model.to(self._device)
        self._resident = True

    def memory_bytes(self) -> int:
        """Device memory held now: the weights."""
        if not self._resident:
            return 0
        return sum(tensor.nbytes for tensor in self._model.parameters())


def _turns(segment: Segment, values: NDArray[np.float64]) -> Iterator[Turn]:
    """values: of the segment's trained tokens"""
    start = 0
    for turn in segment.turns:
        mask = turn.action.mask
        aligned: Float32 = np.zeros(len(mask), dtype=np.float32)
        aligned[mask] = values[start : start + mask.sum()]
        start += mask.sum()
        yield replace(turn, computed={**turn.computed, REFERENCE: aligned})
