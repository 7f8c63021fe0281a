"""Runs a transformers decoder over a `KVCache`: masks, positions, forward passes.

Knows nothing of requests.
"""

from typing import Any

import torch
from torch import Tensor

from actors.backends.hf_attention import GROUPED, use_grouped_attention
from actors.backends.hf_cache import KVCache

_ATTENTION = (GROUPED, "sdpa", "eager")


class ModelRunner:
    """Prefill and decode forwards of one causal LM of Hugging Face transformers.

    Masks are given as additive 4D tensors, which every attention implementation named in
    `_ATTENTION` takes as they are; so no forward spends time on building its own.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        use_grouped_attention(model)
        config = model.config.get_text_config()
        if config._attn_implementation not in _ATTENTION:
            raise ValueError(
                f"attention implementation {config._attn_implementation!r} takes no 4D mask: "
                'load the model with attn_implementation="sdpa"'
            )
        self.model = model
        self.device = device
        self.vocabulary_size = int(config.vocab_size)
        self._dtype = next(model.parameters()).dtype
        self._hidden = torch.finfo(self._dtype).min
        # Layer types are absent in configs of models whose layers are all alike.
        layer_types = getattr(config, "layer_types", None)
        unknown = set(layer_types or ()) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(
                f"{type(model).__name__} has layers of type {', '.join(sorted(unknown))}: this "
                "engine keeps keys and values of full and sliding attention only; use another "
                "generation backend"
            )
        self._window: int | None = getattr(config, "sliding_window", None)
        self._mixed = layer_types is not None and "sliding_attention" in layer_types
        if layer_types is not None and not self._mixed:
            self._window = None

    def prefill(self, tokens: Tensor, cache: KVCache) -> None:
        """Compute keys and values of right-padded sequences. tokens: int64 [batch, time].

        What padding leaves in the cache is finite, lies behind each row's length, and is
        overwritten before it is ever attended to. There are no logits: the last token of a context
        goes through `decode`.
        """
        time = torch.arange(tokens.shape[1], device=self.device)
        self.model.base_model(
            input_ids=tokens,
            attention_mask=self._mask(time[None, :], time),
            position_ids=time[None, :],
            past_key_values=cache,
            use_cache=True,
        )

    def decode(self, tokens: Tensor, positions: Tensor, num_keys: int, cache: KVCache) -> Tensor:
        """One token for each row; returns logits [rows, vocabulary].

        tokens, positions: int64 [rows]    num_keys: at least the largest position + 1
        """
        position_ids = positions[:, None]
        keys = torch.arange(num_keys, device=self.device)
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._mask(position_ids, keys),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _mask(self, queries: Tensor, keys: Tensor) -> Any:
        """Additive masks [batch, 1, time, keys], one for each type of layer if there are several.

        queries: int64 [batch, time], their positions    keys: int64 [keys]
        """
        distance = queries[:, None, :, None] - keys
        full = distance.new_zeros(distance.shape, dtype=self._dtype)
        full.masked_fill_(distance < 0, self._hidden)
        if self._window is None:
            return full
        sliding = full.masked_fill(distance >= self._window, self._hidden)
        if self._mixed:
            return {"full_attention": full, "sliding_attention": sliding}
        return sliding
