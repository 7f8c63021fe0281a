"""Keyed sampling from a batch of logits: which token comes next in each row, and its log-prob.

Draws are those of `actors.randomness`, computed for a whole batch in int64 on the logits' device,
so what a request samples depends on its key and position, never on its row, its company or a
generator's state. Knows nothing of sequences or caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.episodes import Sampling
from actors.randomness import GOLDEN, MASK64, MIX1, MIX2


def as_int64(value: int) -> int:
    """The signed integer with the same 64 bits as `value` modulo 2**64."""
    value &= MASK64
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = as_int64(GOLDEN), as_int64(MIX1), as_int64(MIX2)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's `>>` copies the sign bit down; what it copied is cut off."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Tensor, positions: Tensor) -> Tensor:
    """`actors.randomness.uniform` for each pair, bit for bit.

    keys: int64 [n], the 64-bit keys as signed integers (`as_int64`)   positions: int64 [n]
    Returns float64 [n] in [0, 1). int64 arithmetic wraps modulo 2**64, as the reference masks.
    """
    value = keys + (positions + 1) * _GOLDEN
    value = (value ^ _shift_right(value, 30)) * _MIX1
    value = (value ^ _shift_right(value, 27)) * _MIX2
    value = value ^ _shift_right(value, 31)
    return _shift_right(value, 11).double() * 2.0**-53


@dataclass(frozen=True, slots=True)
class _PerRow:
    """The sampling parameters of rows that differ."""

    temperature: Tensor  # float64 [n, 1], 1 where greedy
    greedy: Tensor  # bool [n]
    top_k: Tensor | None  # int64 [n, 1], vocabulary size where all are kept
    max_top_k: int
    window: Tensor | None  # int64 [n, 2], first and last + 1


class Sampler:
    """Samples one token for each row of a batch whose rows carry `samplings`.

    Built when the rows change, called every step. Where all rows share one transform without top-k,
    which is the common case, the transform is two scalars and a slice.
    """

    def __init__(
        self, samplings: Sequence[Sampling], vocabulary_size: int, device: torch.device
    ) -> None:
        self._vocabulary_size = vocabulary_size
        self._shared = samplings[0] if len(set(samplings)) == 1 else None
        self._rows = None if self._shared else self._per_row(samplings, device)

    def _per_row(self, samplings: Sequence[Sampling], device: torch.device) -> _PerRow:
        size = self._vocabulary_size
        ks = [min(s.top_k, size) or size for s in samplings]
        kept = [k for k in ks if k < size]
        windows = [s.vocabulary or (0, size) for s in samplings]
        return _PerRow(
            temperature=torch.tensor(
                [[s.temperature or 1.0] for s in samplings], dtype=torch.float64, device=device
            ),
            greedy=torch.tensor([s.temperature == 0 for s in samplings], device=device),
            top_k=torch.tensor([[k] for k in ks], device=device) if kept else None,
            max_top_k=max(kept, default=0),
            window=torch.tensor(windows, device=device)
            if any(s.vocabulary for s in samplings)
            else None,
        )

    def __call__(self, logits: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the next token of each row.

        logits: float [n, vocabulary]    keys, positions: int64 [n], see `uniforms`
        Returns tokens int64 [n] and float32 [n] log-probs under the distribution that was sampled
        from, after window, top-k and temperature; for greedy rows that at temperature 1. Tokens
        that tie with the k-th likeliest are all kept. The log-prob is NaN where a row's logits are
        not finite.
        """
        if self._shared is not None:
            return _sample_shared(logits, keys, positions, self._shared)
        assert self._rows is not None
        return _sample_per_row(logits, keys, positions, self._rows)


def _draw(scores: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Inverse CDF in float64. scores: float64 [n, v], unnormalised log-probs. Returns int64 [n, 1].

    The token is the first whose cumulative mass exceeds the draw, so one of zero mass is never
    taken.
    """
    cumulative = torch.softmax(scores, dim=-1).cumsum_(dim=-1)
    drawn = uniforms(keys, positions).unsqueeze(1) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, drawn, right=True)
    return index.clamp_(max=scores.shape[1] - 1)


def _logprobs(scores: Tensor, index: Tensor) -> Tensor:
    """scores: float64 [n, v]    index: int64 [n, 1]    Returns float32 [n]"""
    chosen = scores.gather(1, index).squeeze(1)
    return (chosen - torch.logsumexp(scores, dim=-1)).float()


def _sample_shared(
    logits: Tensor, keys: Tensor, positions: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    first = 0
    if sampling.vocabulary is not None:
        first, end = sampling.vocabulary
        logits = logits[:, first:end]
    scores = logits.double()
    if 0 < sampling.top_k < scores.shape[1]:
        kth = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if sampling.temperature == 0:
        index = scores.argmax(dim=-1, keepdim=True)
    else:
        if sampling.temperature != 1:
            scores = scores / sampling.temperature
        index = _draw(scores, keys, positions)
    return index.squeeze(1) + first, _logprobs(scores, index)


def _sample_per_row(
    logits: Tensor, keys: Tensor, positions: Tensor, rows: _PerRow
) -> tuple[Tensor, Tensor]:
    scores = logits.double()
    if rows.window is not None:
        token = torch.arange(scores.shape[1], device=scores.device)
        outside = (token < rows.window[:, :1]) | (token >= rows.window[:, 1:])
        scores = scores.masked_fill(outside, float("-inf"))
    if rows.top_k is not None:
        likeliest = scores.topk(rows.max_top_k, dim=-1).values
        kth = likeliest.gather(1, (rows.top_k - 1).clamp(max=rows.max_top_k - 1))
        # Rows that keep all tokens have no threshold; their k lies beyond the k likeliest that were
        # sorted.
        kth = kth.masked_fill(rows.top_k > rows.max_top_k, float("-inf"))
        scores = scores.masked_fill(scores < kth, float("-inf"))
    scores = scores / rows.temperature
    index = torch.where(
        rows.greedy.unsqueeze(1),
        scores.argmax(dim=-1, keepdim=True),
        _draw(scores, keys, positions),
    )
    return index.squeeze(1), _logprobs(scores, index)
