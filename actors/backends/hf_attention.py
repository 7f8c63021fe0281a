"""Attention of one new token per row, registered with transformers under a name of our own.

transformers' SDPA attention copies keys and values once for each query head of a group when it is
given a mask. Here the query heads of a group are the rows of one matrix product instead.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "flowd_grouped"


def grouped_decode_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA attention, with a path of its own for decode (one query per row, and a mask).

    query: [batch, heads, time, head_dim]    key, value: [batch, kv_heads, keys, head_dim]
    attention_mask: additive, [batch, 1, time, keys]    Returns [batch, time, heads, head_dim].
    """
    if query.shape[2] > 1 or attention_mask is None or kwargs.get("position_bias") is not None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return result
    batch, heads, _, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    if query.is_cuda or query.dtype.itemsize < 4:
        output = nn.functional.scaled_dot_product_attention(
            grouped, key, value, attn_mask=attention_mask, scale=scaling
        )
    else:
        # For the few keys of small models plain products beat the fused kernel on a CPU.
        scale = dim**-0.5 if scaling is None else scaling
        scores = torch.matmul(grouped * scale, key.transpose(2, 3))
        scores += attention_mask
        output = torch.matmul(torch.softmax(scores, dim=-1), value)
    return output.reshape(batch, 1, heads, -1), None


# With its mask function, so that the model also runs without our masks.
AttentionInterface.register(GROUPED, grouped_decode_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def use_grouped_attention(model: Any) -> None:
    """Let a model whose attention is SDPA decode with grouped attention; others stay as they are."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        model.set_attn_implementation(GROUPED)
