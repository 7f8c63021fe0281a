"""Causal attention within each sequence of a packed row, registered with transformers under a name of our own.

On a GPU in half precision short sequences go through a variable-length kernel, together; long ones through cuDNN's,
one by one, which is a good deal faster on Hopper. Elsewhere sequences of like length are laid side by side.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from actors.backends.packing import Packing, Rectangle

PACKED = "flowd_packed"
LONG = 4096  # tokens from which a sequence is worth kernels of its own
# cuDNN builds a plan for each new length, which takes longer than the attention does.
LONG_MULTIPLE = 512
LONG_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: [1, heads, tokens, head_dim]    key, value: [1, kv_heads, tokens, head_dim]
    packing: of the row; without one there may be several rows, and each is a sequence
    sliding_window: tokens, itself included, that each sees    attention_mask, dropout: None and 0, as models call it

    Returns [1, tokens, heads, head_dim]. Raises ValueError for scores that are capped: no fast kernel does that.
    """
    rows, _, time, _ = query.shape
    if packing is None:
        packing = Packing([time] * rows, query.device)
    if softcap is not None:
        raise ValueError(
            f"{type(module).__name__} caps its attention scores (attn_logit_softcapping = {softcap}), which "
            "training does not do: set it to null in the model's config.json, or train another model"
        )
    # As they come from the projections: [tokens, heads, head_dim].
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if query.is_cuda and query.dtype.itemsize == 2:
        output = _on_gpu(query, key, value, packing, scaling, sliding_window)
    else:
        pieces = [
            _side_by_side(query, key, value, rectangle, scaling, sliding_window)
            for rectangle in packing.rectangles
        ]
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return output.unflatten(0, (rows, time)), None


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    # The long ones are at the end where lengths ascend; elsewhere they go with the others.
    lengths = packing.lengths
    short = len(lengths)
    while short and lengths[short - 1] >= LONG and window is None:
        short -= 1
    pieces = []
    if short:
        end = packing.starts[short]
        pieces.append(
            _varlen(
                query[:end],
                key[:end],
                value[:end],
                packing.offsets(short),
                max(lengths[:short]),
                scaling,
                window,
            )
        )
    for place in range(short, len(lengths)):
        inside = slice(packing.starts[place], packing.starts[place + 1])
        pieces.append(_long(query[inside], key[inside], value[inside], scaling))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    given: dict[str, Any] = {}
    if VARLEN_TAKES_GROUPS:
        given["enable_gqa"] = True
    else:
        copies = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(copies, dim=1) for each in (key, value))
    output = varlen_attn(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        **given,
    )
    assert isinstance(output, Tensor)
    return output


def _long(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One sequence; what is added at its end no token of it sees."""
    length = len(query)
    missing = -length % LONG_MULTIPLE
    if missing:
        query, key, value = (
            nn.functional.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in (query, key, value)
        )
    with sdpa_kernel(LONG_KERNELS, set_priority=True):
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output[0].transpose(0, 1)[:length]


def _side_by_side(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rectangle: Rectangle,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    def laid_out(tensor: Tensor) -> Tensor:
        tensor = tensor[rectangle.first : rectangle.end]
        if rectangle.padded is not None:
            tensor = _Spread.apply(tensor, rectangle.padded, rectangle.packed)
        return tensor.reshape(rectangle.rows, rectangle.width, *tensor.shape[1:]).transpose(1, 2)

    mask = None
    if window is not None and window < rectangle.width:
        places = torch.arange(rectangle.width, device=query.device)
        behind = places[:, None] - places
        mask = (behind >= 0) & (behind < window)
    # Padding is on the right, where causal attention never looks.
    output = scaled_dot_product_attention(
        laid_out(query),
        laid_out(key),
        laid_out(value),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    output = output.transpose(1, 2).reshape(rectangle.rows * rectangle.width, *query.shape[1:])
    if rectangle.padded is not None:
        output = _Gather.apply(output, rectangle.packed, rectangle.padded)
    return output


class _Spread(Function):
    """Rows to their places among padding. What comes back from padding is zero, so it is left out."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, padded: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return tensor.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradients[0].index_select(0, packed), None, None


class _Gather(Function):
    """Rows from among padding, to which nothing comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, packed: Tensor, padded: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.rows = len(padded)
        return tensor.index_select(0, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.rows, *gradients[0].shape[1:])
        return whole.index_copy_(0, packed, gradients[0]), None, None


# No mask function is registered with it, so the models make no masks.
AttentionInterface.register(PACKED, packed_attention)
