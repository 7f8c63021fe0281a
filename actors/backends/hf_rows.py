"""The host's table of running sequences: tokens, lengths, and when each one ends. numpy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.backends.contract import Generation, GenerationRequest
from actors.backends.hf_requests import end_length
from actors.episodes import Int32, Sampling

Rows = NDArray[np.int64]

NO_TOKEN = -1
"""Fills the stop tokens of rows that have fewer than others; never sampled."""


class RowTable:
    """Row i of every array belongs to `requests[i]`; rows in use are the prefix [0, len(requests)).

    tokens: int32 [rows, context], context and sampled tokens of each row; log-probs and versions
    lie beside them.
    """

    def __init__(self, max_context_tokens: int) -> None:
        self._max_context_tokens = max_context_tokens
        self.requests: list[GenerationRequest] = []
        self.tokens: Int32 = np.zeros((0, 0), dtype=np.int32)
        self._logprobs = np.zeros((0, 0), dtype=np.float32)
        self._versions = np.zeros((0, 0), dtype=np.int32)
        self.lengths = np.zeros(0, dtype=np.int64)  # tokens so far
        self._ends = np.zeros(0, dtype=np.int64)  # tokens at which the row ends with "length"
        self.active = np.zeros(0, dtype=np.bool_)  # False: ended, but kept as an idle row
        self._stops = np.zeros((0, 0), dtype=np.int64)
        self._sampling_ids = np.zeros(0, dtype=np.int64)
        self._samplings: dict[Sampling, int] = {}

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, idle ones included."""
        return int(self.lengths[: len(self)].max())

    @property
    def longest_end(self) -> int:
        """Tokens that the longest row may come to have."""
        return int(self._ends[: len(self)].max())

    @property
    def shared_sampling(self) -> Sampling | None:
        """The sampling parameters of all rows; None where they differ."""
        ids = self._sampling_ids[: len(self)]
        return self.requests[0].sampling if (ids == ids[0]).all() else None

    def append(self, requests: Sequence[GenerationRequest]) -> None:
        """Add rows at the end."""
        first = len(self)
        end_lengths = [end_length(r, self._max_context_tokens) for r in requests]
        self._reserve(
            first + len(requests),
            max(end_lengths),
            max(len(r.stop_tokens) for r in requests),
        )
        for row, (request, end) in enumerate(zip(requests, end_lengths, strict=True), start=first):
            c, r = len(request.context), len(request.sampled)
            self.tokens[row, :c] = request.context
            self.tokens[row, c : c + r] = request.sampled
            self._logprobs[row, c : c + r] = request.sampled_logprobs
            self._versions[row, c : c + r] = request.sampled_versions
            self.lengths[row] = c + r
            self._ends[row] = end
            self.active[row] = True
            self._stops[row] = NO_TOKEN
            self._stops[row, : len(request.stop_tokens)] = request.stop_tokens
            self._sampling_ids[row] = self._samplings.setdefault(
                request.sampling, len(self._samplings)
            )
        self.requests.extend(requests)

    def record(self, tokens: Rows, logprobs: NDArray[np.float64], version: int) -> Rows:
        """Append one sampled token to each active row; returns the rows that ended.

        tokens, logprobs: [rows], those of idle rows are not read
        Raises FloatingPointError, with nothing recorded, where a log-prob is NaN.
        """
        n = len(self)
        rows = np.flatnonzero(self.active[:n])
        tokens, logprobs = tokens[rows], logprobs[rows]
        if np.isnan(logprobs).any():
            bad = int(np.isnan(logprobs).sum())
            raise FloatingPointError(
                f"the model's logits are not finite in {bad} of {len(rows)} sequences at policy "
                f"version {version}: its weights have NaN or overflow; look at the trainer's last "
                "steps, or use dtype float32"
            )
        at = self.lengths[rows]
        self.tokens[rows, at] = tokens
        self._logprobs[rows, at] = logprobs
        self._versions[rows, at] = version
        self.lengths[rows] = at + 1
        stopped = (self._stops[rows] == tokens[:, None]).any(axis=1)
        return rows[stopped | (at + 1 >= self._ends[rows])]

    def generation(self, row: int, *, aborted: bool = False) -> Generation:
        """What came of a row so far."""
        request = self.requests[row]
        span = slice(len(request.context), int(self.lengths[row]))
        tokens = self.tokens[row, span].copy()
        if aborted:
            finish = "aborted"
        else:
            finish = "stop" if int(tokens[-1]) in request.stop_tokens else "length"
        return Generation(
            request_id=request.request_id,
            tokens=tokens,
            logprobs=self._logprobs[row, span].copy(),
            versions=self._versions[row, span].copy(),
            finish=finish,
        )

    def keep(self, order: Rows) -> None:
        """Let row i be what row order[i] was; rows not named are gone."""
        n = len(order)
        moved = np.flatnonzero(order != np.arange(n))
        sources = order[moved]
        for array in (
            self.tokens,
            self._logprobs,
            self._versions,
            self.lengths,
            self._ends,
            self.active,
            self._stops,
            self._sampling_ids,
        ):
            array[moved] = array[sources]
        self.requests = [self.requests[row] for row in order.tolist()]
        if not self.requests:
            self._samplings.clear()

    def _reserve(self, rows: int, tokens: int, stops: int) -> None:
        """Grow to at least this many rows, tokens and stop tokens, doubling rows and tokens."""
        old_rows, old_tokens = self.tokens.shape
        old_stops = self._stops.shape[1]
        if rows > old_rows or tokens > old_tokens:
            shape = (max(rows, 2 * old_rows), old_tokens)
            if tokens > old_tokens:
                shape = (max(rows, old_rows), max(tokens, 2 * old_tokens))
            self.tokens = _grown(self.tokens, shape)
            self._logprobs = _grown(self._logprobs, shape)
            self._versions = _grown(self._versions, shape)
            for name in ("lengths", "_ends", "active", "_sampling_ids"):
                setattr(self, name, _grown(getattr(self, name), shape[:1]))
        if rows > self._stops.shape[0] or stops > old_stops:
            shape = (self.tokens.shape[0], max(stops, old_stops))
            self._stops = _grown(self._stops, shape, NO_TOKEN)


def _grown(array: NDArray[Any], shape: tuple[int, ...], fill: int = 0) -> NDArray[Any]:
    """A larger array with `array` in its corner."""
    new = np.full(shape, fill, dtype=array.dtype)
    new[tuple(slice(size) for size in array.shape)] = array
    return new
