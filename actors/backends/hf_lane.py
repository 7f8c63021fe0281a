"""Sequences that advance together: rows in the host's table, on the device and in the KV cache.

The engine has two lanes: one with continuous batching, where ended rows make room at once, and one
that runs a fixed batch, whose rows stay what they are until all have ended.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.backends.contract import Generation, GenerationRequest
from actors.backends.hf_cache import TOKEN_BLOCK, KVCache, round_up
from actors.backends.hf_rows import Rows, RowTable
from actors.backends.hf_runner import ModelRunner
from actors.backends.sampling import Sampler, as_int64
from actors.episodes import Sampling
from actors.randomness import GOLDEN

PREFILL_TOKENS = 16384
"""Padded tokens of one prefill forward: bounds its activations."""


class Lane:
    """Sequences that advance by one token with each `step`.

    fixed: rows keep their place from the first step to the last, ended ones idle along, and the
    cache is allocated for exactly this batch; so shapes, and with them every bit of the result,
    follow from the batch alone.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_rows: int,
        max_context_tokens: int,
        pad_token: int,
        fixed: bool,
    ) -> None:
        self._runner = runner
        self._pad_token = pad_token
        self._fixed = fixed
        self.rows = RowTable(max_context_tokens)
        self.cache = KVCache(max_rows, max_context_tokens)
        self._num_prefilled = 0
        # Device state of each row: the token to feed next, its position, and the key of its draws.
        self._tokens = torch.zeros(0, dtype=torch.int64, device=runner.device)
        self._positions = self._tokens.clone()
        self._keys = self._tokens.clone()
        self._advance: Tensor | None = None  # int64 [rows], 0 where idle; None: all advance
        self._sampler: Sampler | None = None
        self._sampling: Sampling | None = None

    @property
    def num_active(self) -> int:
        """Sequences that have not ended."""
        return int(self.rows.active[: len(self.rows)].sum())

    def admit(self, requests: Sequence[GenerationRequest]) -> None:
        """Add sequences; the next `step` prefills them."""
        if self._fixed:
            # Whatever order they came in, a batch is one and the same.
            ordered = sorted(requests, key=lambda r: (r.key, r.request_id))
        else:
            # Rows of similar length are prefilled together, with less padding.
            ordered = sorted(requests, key=lambda r: len(r.context) + len(r.sampled))
        self.rows.append(ordered)
        last = [r.sampled[-1] if len(r.sampled) else r.context[-1] for r in ordered]
        positions = [len(r.context) + len(r.sampled) - 1 for r in ordered]
        # Draw i is made at position len(context) + i - 1: in shifted keys, positions count draws.
        keys = [as_int64(r.key + (1 - len(r.context)) * GOLDEN) for r in ordered]
        new = torch.tensor([last, positions, keys], dtype=torch.int64).to(self._runner.device)
        self._tokens = torch.cat((self._tokens, new[0]))
        self._positions = torch.cat((self._positions, new[1]))
        self._keys = torch.cat((self._keys, new[2]))
        self._rows_changed()

    def step(self, version: int) -> list[Generation]:
        """Prefill new rows, then sample one token for every active row.

        Returns the sequences that ended. `version` is what the new tokens are marked with.
        """
        rows = self.rows
        n = len(rows)
        if n == 0:
            return []
        num_keys = round_up(rows.longest, TOKEN_BLOCK)
        if self._fixed:
            self.cache.reserve(n, rows.longest_end, exact=True)
        else:
            self.cache.reserve(n, num_keys)
        if self._num_prefilled < n:
            self._prefill(self._num_prefilled, n)
            self._num_prefilled = n
        self.cache.begin_decode(self._positions, num_keys)
        logits = self._runner.decode(self._tokens, self._positions, num_keys, self.cache)
        assert self._sampler is not None
        tokens, logprobs = self._sampler(logits, self._keys, self._positions)
        if self._advance is None:
            self._tokens = tokens
            self._positions += 1
        else:
            self._tokens = torch.where(self._advance == 1, tokens, self._tokens)
            self._positions += self._advance
        # One transfer, and the only point where the host waits for the device; float64 holds both
        # exactly.
        host = torch.stack((tokens.double(), logprobs.double())).cpu().numpy()
        ended = rows.record(host[0].astype(np.int64), host[1], version)
        return self._end(ended, aborted=False)

    def abort(self, request_ids: frozenset[int] | None) -> list[Generation]:
        """End these sequences (all when None) as they are."""
        return self._end(
            np.array(
                [
                    row
                    for row, request in enumerate(self.rows.requests)
                    if self.rows.active[row]
                    and (request_ids is None or request.request_id in request_ids)
                ],
                dtype=np.int64,
            ),
            aborted=True,
        )

    def forget_prefixes(self) -> None:
        """Drop the cache (the weights changed); the next `step` prefills every row again."""
        self.cache.clear()
        self._num_prefilled = 0

    def _prefill(self, first: int, end: int) -> None:
        """Fill the cache with all but the last token of rows [first, end), chunk by chunk."""
        lengths = self.rows.lengths[first:end] - 1
        start = 0
        while start < len(lengths):
            longest = np.maximum.accumulate(lengths[start:])
            padded = longest * np.arange(1, len(longest) + 1)
            count = max(1, int(np.searchsorted(padded, PREFILL_TOKENS, side="right")))
            time = int(longest[count - 1])
            if time > 0:
                self._prefill_chunk(first + start, lengths[start : start + count], time)
            start += count

    def _prefill_chunk(self, first: int, lengths: Rows, time: int) -> None:
        block = self.rows.tokens[first : first + len(lengths), :time]
        padded = np.where(np.arange(time) < lengths[:, None], block, self._pad_token)
        # The members of a group share their prompt: compute it once, store it for each of them.
        distinct, sources = np.unique(padded, axis=0, return_inverse=True)
        device = self._runner.device
        if len(distinct) == len(padded):
            self.cache.begin_prefill(first, None)
            distinct = padded
        else:
            self.cache.begin_prefill(first, torch.from_numpy(sources.reshape(-1)).to(device))
        tokens = torch.from_numpy(distinct.astype(np.int64)).to(device)
        self._runner.prefill(tokens, self.cache)

    def _end(self, ended: Rows, *, aborted: bool) -> list[Generation]:
        """Take the results of rows that ended and free them; in a fixed batch let them idle."""
        if len(ended) == 0:
            return []
        results = [self.rows.generation(row, aborted=aborted) for row in ended.tolist()]
        n = len(self.rows)
        self.rows.active[ended] = False
        if not self.rows.active[:n].any():
            self._clear()
        elif self._fixed:
            active = torch.from_numpy(self.rows.active[:n].astype(np.int64))
            self._advance = active.to(self._runner.device)
        else:
            self._compact()
        return results

    def _compact(self) -> None:
        """Fill the holes that ended rows leave with the last rows."""
        n = len(self.rows)
        alive = np.flatnonzero(self.rows.active[:n])
        order = np.arange(len(alive))
        holes = np.flatnonzero(~self.rows.active[: len(alive)])
        order[holes] = alive[len(alive) - len(holes) :]
        device_order = torch.from_numpy(order).to(self._runner.device)
        if len(holes):
            longest = int(self.rows.lengths[order[holes]].max())
            destinations = torch.from_numpy(holes).to(self._runner.device)
            self.cache.move(device_order[destinations], destinations, longest)
        self.rows.keep(order)
        # Either every row was prefilled, or the cache was dropped and none is.
        self._num_prefilled = min(self._num_prefilled, len(order))
        self._tokens = self._tokens.index_select(0, device_order)
        self._positions = self._positions.index_select(0, device_order)
        self._keys = self._keys.index_select(0, device_order)
        self._rows_changed()

    def _clear(self) -> None:
        self.rows.keep(np.zeros(0, dtype=np.int64))
        self._num_prefilled = 0
        self._tokens = self._tokens[:0]
        self._positions = self._positions[:0]
        self._keys = self._keys[:0]
        self._advance = None
        if self._fixed:
            self.cache.clear()

    def _rows_changed(self) -> None:
        shared = self.rows.shared_sampling
        if shared is not None and shared == self._sampling:
            return
        self._sampling = shared
        samplings = [shared] if shared is not None else [r.sampling for r in self.rows.requests]
        self._sampler = Sampler(samplings, self._runner.vocabulary_size, self._runner.device)
