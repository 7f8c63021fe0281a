"""GRPO's functions against cases worked by hand and identities."""

import math

import pytest
import torch
from algorithm_cases import episodes, one_token_each, settings, token_batch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.algorithms import aggregation as aggregation_of
from actors.algorithms import disagreement, grpo, registry
from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import TokenBatch

GRPO = settings()
DR_GRPO = settings("dr_grpo")
REWARDS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=16)


def batch(
    ratios: list[float], advantages: list[float], weights: list[float] | None = None
) -> TokenBatch:
    """Tokens whose policy ratios are given; in float64."""
    count = len(ratios)
    return token_batch(
        [math.log(r) - 1.0 for r in ratios],
        [-1.0] * count,
        advantages,
        weights=weights or [1.0] * count,
        entropy=torch.full((count,), 0.5, dtype=torch.float64, requires_grad=True),
    )


def advantages_of(rewards: list[float], config: AlgorithmConfig) -> Tensor:
    """Of one group, whose samples have a token each."""
    return grpo.advantages(one_token_each(rewards), config).advantages


def gradient(tokens: TokenBatch, config: AlgorithmConfig) -> list[float]:
    total, _ = grpo.loss(tokens, config)
    total.backward()
    assert tokens.logprobs.grad is not None
    return tokens.logprobs.grad.tolist()


def test_one_right_answer_of_four_has_the_advantage_worked_by_hand():
    """Mean 1/4, standard deviation sqrt(3)/4."""
    rewards = [1.0, 0.0, 0.0, 0.0]
    expected = [3 / math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    assert advantages_of(rewards, GRPO).tolist() == pytest.approx(expected)
    assert advantages_of(rewards, DR_GRPO).tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("config", [GRPO, DR_GRPO])
@pytest.mark.parametrize("rewards", [[0.3], [0.1] * 7, [0.0] * 8, [1e4 + 0.1] * 3])
def test_a_group_of_one_or_of_equal_rewards_teaches_nothing(
    config: AlgorithmConfig, rewards: list[float]
):
    """Rounding in the mean is not blown up into an advantage."""
    advantages = advantages_of(rewards, config)
    assert advantages.abs().max() < (1e-2 if rewards[0] > 1 else 1e-7)
    if rewards[0] < 1:
        assert not (config.normalization == "group" and advantages.any())


@given(REWARDS)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(rewards: list[float]):
    """Whatever the rewards."""
    values = torch.tensor(rewards, dtype=torch.float64)
    advantages = advantages_of(rewards, GRPO)
    assert abs(float(advantages.sum())) < 1e-6
    assert float(advantages.square().mean()) <= 1 + 1e-6
    for i, j in zip(values.argsort()[:-1], values.argsort()[1:], strict=True):
        assert advantages[i] <= advantages[j]


def test_the_gradient_is_cut_only_where_it_leads_further_away():
    """PPO's clipping: a good token above 1.2 and a bad one below 0.8 have none; the opposite cases have all."""
    ratios = [1.3, 1.3, 0.7, 0.7, 1.1]
    tokens = batch(ratios, [1.0, -1.0, 1.0, -1.0, 2.0])
    assert gradient(tokens, GRPO) == pytest.approx([0.0, 1.3, -0.7, 0.0, -2.2])
    total, sums = grpo.loss(tokens, GRPO)
    assert total.item() == pytest.approx(-(1.2 - 1.3 + 0.7 - 0.8 + 2.2))
    assert float(sums["clip_fraction"]) == 2
    apart, _ = disagreement.measure(tokens.logprobs, tokens.behaviour_logprobs)
    assert float(apart["ratio_mean"]) == pytest.approx(sum(ratios))


def test_clip_higher_leaves_more_room_above():
    """DAPO, section 3.1."""
    wide = settings(clip_high=0.4)
    assert gradient(batch([1.3], [1.0]), wide) == pytest.approx([-1.3])
    assert gradient(batch([0.7], [-1.0]), wide) == [0.0]


def test_on_policy_the_gradient_is_that_of_reinforce():
    """With ratio 1 each token gets minus its weighted advantage."""
    tokens = batch([1.0, 1.0], [0.5, -2.0], [1.0, 0.25])
    assert gradient(tokens, GRPO) == pytest.approx([-0.5, 0.5])
    _, sums = grpo.loss(tokens, GRPO)
    apart, _ = disagreement.measure(tokens.logprobs, tokens.behaviour_logprobs)
    assert float(apart["kl_sampler"]) == 0
    assert float(sums["clip_fraction"]) == 0


def test_k3_estimates_the_kl_between_sampler_and_trainer():
    """Its mean over the sampler's distribution is exactly KL(sampler ‖ trainer)."""
    sampler = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    trainer = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    sums, _ = disagreement.measure(trainer.log(), sampler.log())
    ratio = trainer / sampler
    assert float(sums["kl_sampler"]) == pytest.approx(float((ratio - 1 - ratio.log()).sum()))
    k3_mean = float((sampler * (ratio - 1 - ratio.log())).sum())
    kl = float((sampler * (sampler / trainer).log()).sum())
    assert k3_mean == pytest.approx(kl)


def test_a_token_left_far_behind_keeps_the_sums_finite():
    """A ratio of e^1000 is no number in float32."""
    tokens = token_batch([-0.1], [-1000.0], [-1.0])
    total, sums = grpo.loss(tokens, GRPO)
    assert math.isfinite(total.item())
    assert all(math.isfinite(float(value)) for value in sums.values())


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token", [6.0, 2.0]), ("sequence", [2.0, 1.0]), ("chunk", [3.0, 1.0]), ("sum", [2.0, 1.0])],
)
def test_weights_of_all_tokens_sum_to_the_denominator(aggregation: str, expected: list[float]):
    """A mean over tokens, or over sequences or turns of the mean over theirs; an empty sequence counts nowhere. A sum
    over tokens is divided by the number of sequences and the constant."""
    config = settings(loss_aggregation=aggregation, sum_length=4)
    cases = episodes([[[1, 0.0]], [[0, 0.0]], [[2, 0.0], [3, 1.0]]], [[[2, 0.0]]])
    weights = aggregation_of.weights(cases, config)
    assert aggregation_of.denominators(cases, config).tolist() == expected
    total = 8 / 4 if aggregation == "sum" else sum(expected)
    assert float(weights.sum()) == pytest.approx(total)
    by_sample = {"sequence": [1.0, 1 / 5], "chunk": [1.0, 1 / 2]}.get(aggregation)
    if by_sample:
        assert weights[:2].tolist() == by_sample


def test_the_entropy_bonus_pulls_entropy_up():
    """Its gradient is minus the coefficient times the weight; without coefficient there is none."""
    tokens = batch([1.0, 1.0], [0.0, 0.0], [1.0, 0.5])
    total, sums = grpo.loss(tokens, settings(entropy_coefficient=0.1))
    total.backward()
    assert tokens.entropy.grad is not None
    assert tokens.entropy.grad.tolist() == pytest.approx([-0.1, -0.05])
    assert float(sums["entropy"]) == 1.0
    plain = batch([1.0], [1.0])
    grpo.loss(plain, GRPO)[0].backward()
    assert plain.entropy.grad is None


def test_metrics_have_the_declared_names():
    """The trainer reduces them over ranks by these names, also on a rank without groups."""
    _, sums = grpo.loss(batch([1.0], [1.0]), GRPO)
    assert tuple(sums) == grpo.METRICS


def test_an_unknown_algorithm_is_told_the_near_name():
    """Value seen, rule, way out."""
    assert registry.find("grpo").METRICS == grpo.METRICS
    with pytest.raises(ValueError, match=r'name = "grpoo": did you mean "grpo"'):
        registry.find("grpoo")
    with pytest.raises(ValueError, match="known are grpo"):
        registry.find("zzz")
