"""Preallocated key-value memory for a batch of rows, in the form that transformers' layers call.

Rows in use are the prefix [0, n): whoever owns the cache keeps them compact with `move`. Knows
nothing of tokens, weights or sampling.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

TOKEN_BLOCK = 16
"""Key lengths are multiples of this, so that decode kernels see few shapes and aligned masks."""


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def grown(needed: int, maximum: int, minimum: int = 1) -> int:
    """The capacity for `needed`: a power of two from `minimum` on, but never above `maximum`."""
    return min(maximum, max(minimum, 1 << max(needed - 1, 0).bit_length()))


class KVCache(Cache):
    """Keys and values of every layer, growing by powers of two up to a maximum.

    Each is a tensor [rows, heads, tokens, head_dim], so that a row's head is one contiguous matrix,
    which is what batched matrix products read fastest. One forward pass either prefills rows
    (`begin_prefill`: attention sees only what it just computed) or decodes one token of every row
    (`begin_decode`: attention sees views of the cache). Layers are allocated at their first update,
    because only then are their shapes known (grouped heads, values narrower than keys). Unused
    memory is zero: masked positions still enter the product with the values, where NaN times zero
    would be NaN.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.max_tokens = round_up(max_tokens, TOKEN_BLOCK)
        self.rows = 0
        self.tokens = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._prefill: tuple[int, Tensor | None] | None = None
        self._positions: Tensor | None = None
        self._slots: dict[int, Tensor] = {}
        self._num_keys = 0

    def reserve(self, rows: int, tokens: int, *, exact: bool = False) -> None:
        """Make room for `rows` rows of `tokens` tokens, keeping what is stored.

        exact: allocate just this much (tokens in whole blocks), not the next power of two.
        """
        if rows <= self.rows and tokens <= self.tokens:
            return
        if exact:
            new_rows, new_tokens = rows, round_up(tokens, TOKEN_BLOCK)
        else:
            new_rows = max(self.rows, grown(rows, self.max_rows))
            new_tokens = max(self.tokens, grown(tokens, self.max_tokens, TOKEN_BLOCK))
        for store in (self._keys, self._values):
            for layer, old in store.items():
                # Layer by layer, so that at most one layer is held twice.
                store[layer] = old.new_zeros(new_rows, old.shape[1], new_tokens, old.shape[3])
                store[layer][: self.rows, :, : self.tokens] = old
        self.rows, self.tokens = new_rows, new_tokens

    def begin_prefill(self, first_row: int, sources: Tensor | None) -> None:
        """The next forward fills rows from `first_row` on, from position 0.

        sources: int64 [rows], the sequence of the forward's batch that each row stores; None is one
        each, in order.
        """
        self._prefill = (first_row, sources)

    def begin_decode(self, positions: Tensor, num_keys: int) -> None:
        """The next forward adds one token to each of the first rows, and sees keys [0, num_keys).

        positions: int64 [rows], where each row's token goes; it may change after the forward.
        """
        self._prefill = None
        self._positions, self._num_keys = positions, num_keys
        self._slots.clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; returns those to attend to.

        Both are [batch, heads, tokens, head_dim].
        """
        if layer_idx not in self._keys:
            for store, states in ((self._keys, key_states), (self._values, value_states)):
                shape = (self.rows, states.shape[1], self.tokens, states.shape[3])
                store[layer_idx] = states.new_zeros(shape)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._prefill is not None:
            first, sources = self._prefill
            for stored, states in ((keys, key_states), (values, value_states)):
                kept = states if sources is None else states.index_select(0, sources)
                stored[first : first + kept.shape[0], :, : kept.shape[2]] = kept
            return key_states, value_states
        num_rows, heads = key_states.shape[:2]
        slots = self._slots.get(heads)
        if slots is None:
            slots = self._slots[heads] = self._slots_of(heads)
        for stored, states in ((keys, key_states), (values, value_states)):
            dim = states.shape[3]
            stored.view(-1, dim).index_copy_(0, slots, states.reshape(-1, dim))
        seen = (slice(num_rows), slice(None), slice(self._num_keys))
        return keys[seen], values[seen]

    def _slots_of(self, heads: int) -> Tensor:
        """Where a decode's new tokens lie in a layer seen as [rows * heads * tokens, head_dim]."""
        assert self._positions is not None
        rows = torch.arange(len(self._positions) * heads, device=self._positions.device)
        slots = rows.view(-1, heads) * self.tokens + self._positions[:, None]
        return slots.view(-1)

    def move(self, sources: Tensor, destinations: Tensor, num_tokens: int) -> None:
        """Copy the first `num_tokens` of some rows over others, int64 [m] and disjoint."""
        for store in (self._keys, self._values):
            for stored in store.values():
                used = stored[:, :, :num_tokens]
                used.index_copy_(0, destinations, used.index_select(0, sources))

    def clear(self) -> None:
        """Forget everything stored, and give its memory back."""
        self._keys.clear()
        self._values.clear()
        self._slots.clear()
        self._positions = None
        self.rows = self.tokens = 0

    def memory_bytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for store in (self._keys, self._values) for t in store.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys that attention sees. Positions and masks are given, so nothing derives from it."""
        return 0 if self._prefill is not None else self._num_keys
