"""Preallocated key-value memory for a batch of rows, in the form that transformers' attention
layers call.

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
    """The capacity that holds `needed`: a power of two, at least `minimum`, but never above
    `maximum`.
    """
    return min(maximum, max(minimum, 1 << max(needed - 1, 0).bit_length()))


class KVCache(Cache):
    """Keys and values [rows, tokens, heads, head_dim] of every layer; grows by powers of two up to
    a maximum.

    One forward pass either prefills rows (`begin_prefill`: attention sees only what it just
    computed) or decodes one token of every row (`begin_decode`: attention sees views of the cache).
    Layers are allocated at their first update, because only then are their shapes known (grouped
    heads, values narrower than keys). Unused memory is
    zero: masked positions still enter the product with the values, where NaN times zero would be
    NaN.
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
        self._decode_slots: Tensor | None = None
        self._num_rows = 0
        self._num_keys = 0

    def reserve(self, rows: int, tokens: int, *, exact: bool = False) -> None:
        """Make room for `rows` rows of `tokens` tokens, keeping what is stored.

        exact: allocate just this much (rounded up to the token block) instead of the next power of
        two.
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
                store[layer] = old.new_zeros(new_rows, new_tokens, *old.shape[2:])
                store[layer][: self.rows, : self.tokens] = old
        self.rows, self.tokens = new_rows, new_tokens

    def begin_prefill(self, first_row: int, sources: Tensor | None) -> None:
        """The next forward fills rows from `first_row` on, from position 0.

        sources: int64 [rows], which sequence of the forward's batch each row stores; None is one
        each, in order.
        """
        self._prefill = (first_row, sources)

    def begin_decode(self, num_rows: int, num_keys: int, positions: Tensor) -> None:
        """The next forward adds one token to each of the first rows, and sees keys [0, num_keys).

        positions: int64 [num_rows], where each row's token goes.
        """
        self._prefill = None
        self._num_rows, self._num_keys = num_rows, num_keys
        offsets = torch.arange(num_rows, device=positions.device) * self.tokens
        self._decode_slots = offsets + positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values [batch, heads, tokens, head_dim]; returns those to
        attend to.
        """
        if layer_idx not in self._keys:
            for store, states in ((self._keys, key_states), (self._values, value_states)):
                heads, dim = states.shape[1], states.shape[3]
                store[layer_idx] = states.new_zeros(self.rows, self.tokens, heads, dim)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._prefill is not None:
            first, sources = self._prefill
            for stored, states in ((keys, key_states), (values, value_states)):
                states = states.transpose(1, 2)
                if sources is not None:
                    states = states.index_select(0, sources)
                stored[first : first + states.shape[0], : states.shape[1]] = states
            return key_states, value_states
        assert self._decode_slots is not None
        views = []
        for stored, states in ((keys, key_states), (values, value_states)):
            new = states.transpose(1, 2).reshape(states.shape[0], -1)  # [rows, heads * head_dim]
            stored.view(-1, new.shape[1]).index_copy_(0, self._decode_slots, new)
            views.append(stored[: self._num_rows, : self._num_keys].transpose(1, 2))
        return views[0], views[1]

    def move(self, sources: Tensor, destinations: Tensor, num_tokens: int) -> None:
        """Copy the first `num_tokens` of some rows over others. sources, destinations: int64 [m],
        disjoint.
        """
        for store in (self._keys, self._values):
            for stored in store.values():
                used = stored[:, :num_tokens]
                used.index_copy_(0, destinations, used.index_select(0, sources))

    def clear(self) -> None:
        """Forget everything stored, and give its memory back."""
        self._keys.clear()
        self._values.clear()
        self._decode_slots = None
        self.rows = self.tokens = 0

    def memory_bytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.nbytes for store in (self._keys, self._values) for t in store.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Keys that attention sees; positions and masks are always passed explicitly, so nothing
        derives from it.
        """
        return 0 if self._prefill is not None else self._num_keys
