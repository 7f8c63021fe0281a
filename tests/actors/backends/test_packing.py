"""Sequences packed into one row: every one reads as it does alone."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trainer_cases import SHAPE, engine, make_groups, qwen
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.backends.packed_attention import LONG, LONG_MULTIPLE, packed_attention
from actors.backends.packing import PackedBatch, Packing
from actors.backends.token_logprobs import TokenLogprobs
from actors.backends.training_batches import lay_out, micro_batches

CPU = torch.device("cpu")
LENGTHS = (1, 2, 2, 3, 5, 7, 7, 30)


def reference(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """One sequence, one head and one token at a time. query: [heads, time, dim]    Returns [time, heads, dim]."""
    copies = query.shape[0] // key.shape[0]
    output = torch.zeros(query.shape[1], query.shape[0], query.shape[2], dtype=query.dtype)
    for head in range(query.shape[0]):
        for place in range(query.shape[1]):
            first = 0 if window is None else max(0, place + 1 - window)
            seen = slice(first, place + 1)
            scores = key[head // copies, seen] @ query[head, place] / query.shape[2] ** 0.5
            output[place, head] = scores.softmax(0) @ value[head // copies, seen]
    return output


@pytest.mark.parametrize("window", [None, 4])
def test_attention_stays_within_each_sequence(window: int | None):
    """Against loops, with groups of query heads and lengths from one to thirty; gradients by finite differences."""
    torch.manual_seed(0)
    packing = Packing(LENGTHS, CPU)
    query, key, value = (
        torch.randn(1, heads, sum(LENGTHS), 4, dtype=torch.float64) for heads in (4, 2, 2)
    )
    output, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, packing=packing, sliding_window=window
    )
    for first, end in zip(packing.starts, packing.starts[1:], strict=False):
        inside = slice(first, end)
        expected = reference(query[0, :, inside], key[0, :, inside], value[0, :, inside], window)
        torch.testing.assert_close(output[0, inside], expected)
    small = Packing((1, 3, 4), CPU)
    inputs = [t[:, :, :8].clone().requires_grad_() for t in (query, key, value)]
    assert torch.autograd.gradcheck(
        lambda *given: packed_attention(
            torch.nn.Module(), *given, None, packing=small, sliding_window=window
        )[0],
        inputs,
    )


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (Qwen3ForCausalLM, Qwen3Config(**SHAPE)),
        (LlamaForCausalLM, LlamaConfig(**SHAPE)),
        (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=3)),
    ],
    ids=["qwen3", "llama", "mistral"],
)
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(make: Any, config: Any):
    """Of models of several families, one with a sliding window; transformers' own forward pass is the reference."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    alone = make(config).double().eval()
    logprobs = TokenLogprobs(copy.deepcopy(alone))
    (batch,) = micro_batches(lay_out(make_groups()).sequences, 10_000)
    read = logprobs(PackedBatch(batch, CPU), torch.float64).logprobs
    read.sum().backward()
    expected = []
    for sequence in batch:
        tokens = torch.from_numpy(sequence.tokens)
        by_place = alone(input_ids=tokens[None]).logits[0].log_softmax(-1)
        expected.append(by_place[sequence.positions - 1, tokens[sequence.positions]])
    torch.cat(expected).sum().backward()
    # transformers' norms and softmax compute in float32 inside.
    torch.testing.assert_close(read, torch.cat(expected), rtol=0, atol=1e-6)
    for packed, plain in zip(logprobs.model.parameters(), alone.parameters(), strict=True):
        assert (packed.grad - plain.grad).norm() <= 1e-4 * plain.grad.norm()


def test_the_order_in_the_row_changes_nothing():
    """Sequences of like length are laid side by side where they are neighbours; they need not be."""
    model = TokenLogprobs(qwen())
    (batch,) = micro_batches(lay_out(make_groups()).sequences, 10_000)
    shuffled = [batch[place] for place in np.random.default_rng(0).permutation(len(batch))]
    read = {}
    for order in (batch, shuffled):
        packed = PackedBatch(order, CPU)
        values = model(packed, torch.float64).logprobs.detach()
        read[id(order)] = {id(s): v for s, v in packed.by_sequence(values)}
    for sequence in batch:
        one, other = (found[id(sequence)] for found in read.values())
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-7)


def test_micro_batches_are_full_to_the_budget():
    """Tokens count, padding does not; a sequence beyond the budget comes alone."""
    sequences = lay_out(make_groups()).sequences
    budget = 20
    batches = list(micro_batches(sequences, budget))
    tokens = [sum(len(s.tokens) for s in batch) for batch in batches]
    assert all(count <= budget for count in tokens)
    longest = max(len(s.tokens) for s in sequences)
    assert all(count > budget - longest for count in tokens[:-1])
    assert sum(len(batch) for batch in batches) == len(sequences)
    alone = list(micro_batches(sequences, 1))
    assert [len(batch) for batch in alone] == [1] * len(sequences)


def test_a_model_that_cannot_be_packed_is_refused():
    """One whose blocks carry something on from token to token, and one that caps its attention scores."""
    model = qwen()
    model.model.layers[0].register_forward_hook(lambda module, given, output: output.cumsum(1))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM cannot be trained: sequences packed"):
        engine(model)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SHAPE)).eval()
    with pytest.raises(ValueError, match=r"attn_logit_softcapping = 50\.0"):
        engine(gemma)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 100])
def test_gpu_kernels_agree_with_float32(window: int | None):
    """Short sequences, long ones, lengths that fit the plans of the long ones and that do not; gradients too."""
    device = torch.device("cuda")
    lengths = (1, 17, 64, 300, LONG, LONG + 3, LONG + LONG_MULTIPLE)
    packing = Packing(lengths, device)
    torch.manual_seed(0)
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]
    exact = [torch.randn(shape, device=device).bfloat16().float() for shape in shapes]
    read = {}
    for dtype in (torch.float32, torch.bfloat16):
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
        output, _ = packed_attention(
            torch.nn.Module(), *given, None, packing=packing, sliding_window=window
        )
        output.square().sum().backward()
        read[dtype] = [output.detach(), *(tensor.grad for tensor in given)]
    for half, single in zip(read[torch.bfloat16], read[torch.float32], strict=True):
        assert (half.float() - single).norm() < 0.02 * single.norm()
