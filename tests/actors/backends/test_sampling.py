"""Keyed draws and the transforms between logits and a sampled token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.backends.sampling import Sampler, as_int64, uniforms
from actors.episodes import Sampling
from actors.randomness import GOLDEN, fold, uniform

CPU = torch.device("cpu")
KEYS = st.integers(min_value=0, max_value=2**64 - 1)


def tensor_of_keys(keys: list[int]) -> torch.Tensor:
    return torch.tensor([as_int64(key) for key in keys])


@given(st.lists(st.tuples(KEYS, st.integers(0, 2**31)), min_size=1, max_size=40))
def test_draws_equal_the_scalar_reference(pairs: list[tuple[int, int]]):
    """int64 tensors wrap and shift as the masked Python integers do, bit for bit."""
    keys, positions = [key for key, _ in pairs], [position for _, position in pairs]
    drawn = uniforms(tensor_of_keys(keys), torch.tensor(positions))
    assert drawn.tolist() == [uniform(key, position) for key, position in pairs]


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, fold(1, 2, 3)])
def test_shifting_a_key_by_golden_shifts_the_position(key: int):
    """The engine folds a prompt's length into the key, so that a position counts the draws."""
    shifted = tensor_of_keys([key - 5 * GOLDEN])
    assert uniforms(shifted, torch.tensor([12])).item() == uniform(key, 7)


def reference(logits: list[float], sampling: Sampling, draw: float) -> tuple[int, float]:
    """One row in plain Python: keep, scale, normalise, walk along the cumulative sum."""
    first, end = sampling.vocabulary or (0, len(logits))
    kept = {token: logits[token] for token in range(first, end)}
    if sampling.top_k:
        kth = sorted(kept.values(), reverse=True)[: sampling.top_k][-1]
        kept = {token: value for token, value in kept.items() if value >= kth}
    scores = {token: value / (sampling.temperature or 1.0) for token, value in kept.items()}
    top = max(scores.values())
    mass = {token: math.exp(value - top) for token, value in scores.items()}
    total = sum(mass.values())
    if sampling.temperature == 0:
        token = max(scores, key=lambda t: scores[t])
    else:
        reached = 0.0
        for token in sorted(mass):
            reached += mass[token]
            if reached > draw * total:
                break
    return token, math.log(mass[token] / total)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 500]),
    vocabulary=st.sampled_from([None, (0, 20), (4, 11), (19, 20)]),
)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(SAMPLINGS, KEYS, st.integers(0, 300)), min_size=1, max_size=8),
    same=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_row_is_sampled_as_by_the_reference(
    rows: list[tuple[Sampling, int, int]], same: bool, seed: int
):
    """Whatever the mix of transforms in a batch, each row gives what it would give alone."""
    samplings = [rows[0][0] if same else sampling for sampling, _, _ in rows]
    keys, positions = [key for _, key, _ in rows], [position for _, _, position in rows]
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(rows), 20)) * 3).float()
    sampler = Sampler(samplings, 20, CPU)
    tokens, logprobs = sampler(logits, tensor_of_keys(keys), torch.tensor(positions))
    for row, sampling in enumerate(samplings):
        draw = uniform(keys[row], positions[row])
        token, logprob = reference(logits[row].double().tolist(), sampling, draw)
        assert tokens[row] == token
        assert logprobs[row] == pytest.approx(logprob, abs=1e-6)
    assert logprobs.dtype == torch.float32


def test_frequencies_follow_the_distribution():
    """Over many keys the tokens come with their probabilities (5 standard errors)."""
    n = 20_000
    probabilities = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    keys = tensor_of_keys([fold(11, i) for i in range(n)])
    sampler = Sampler([Sampling()], 5, CPU)
    logits = probabilities.log().expand(n, 5)
    tokens, _ = sampler(logits, keys, torch.zeros(n, dtype=torch.int64))
    counts = torch.bincount(tokens, minlength=5)
    expected = probabilities.double() * n
    error = (expected * (1 - probabilities.double())).sqrt()
    assert counts[2] == 0
    assert ((counts - expected).abs() <= 5 * error).all()


def test_a_draw_of_zero_takes_no_token_without_mass():
    """The smallest draw there is belongs to the first token that can be sampled."""
    key = -GOLDEN  # the finalizer maps 0 to 0
    assert uniform(key, 0) == 0.0
    logits = torch.tensor([[float("-inf"), float("-inf"), 0.0, 1.0]])
    token, _ = Sampler([Sampling()], 4, CPU)(logits, tensor_of_keys([key]), torch.tensor([0]))
    assert token.tolist() == [2]


def test_tokens_that_tie_with_the_kth_are_all_kept():
    """With top_k = 2 over scores 1, 1, 1, 0 three tokens remain, each with a third."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(64, 4)
    keys = tensor_of_keys([fold(3, i) for i in range(64)])
    for samplings in ([Sampling(top_k=2)], [Sampling(top_k=2)] * 63 + [Sampling()]):
        sampler = Sampler(samplings, 4, CPU)
        tokens, logprobs = sampler(logits, keys, torch.zeros(64, dtype=torch.int64))
        assert set(tokens[:63].tolist()) == {0, 1, 2}
        np.testing.assert_allclose(logprobs[:63], math.log(1 / 3), rtol=1e-6)


def test_logits_that_are_not_finite_give_a_nan_logprob():
    """A broken row shows in its log-prob, and only there."""
    logits = torch.zeros(3, 7)
    logits[1, 4] = float("nan")
    _, logprobs = Sampler([Sampling()], 7, CPU)(
        logits, torch.arange(3), torch.zeros(3, dtype=torch.int64)
    )
    assert torch.isnan(logprobs).tolist() == [False, True, False]
