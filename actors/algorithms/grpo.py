"""Group relative policy optimization (GRPO), with Dr. GRPO and DAPO's loss as settings.

Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1: the baseline of a sample is the mean reward of its
group, and the policy ratio is clipped as in PPO. Dr. GRPO (https://arxiv.org/abs/2503.20783) leaves the division by the
standard deviation out; DAPO (https://arxiv.org/abs/2503.14476) clips higher above than below (3.1) and takes the mean
over tokens, not over sequences (3.3).
"""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import TokenBatch

METRICS = ("clip_fraction", "ratio_mean", "kl_sampler", "entropy")
STD_FLOOR = 1e-6  # a group of nearly equal rewards is not blown up
MAX_LOG_RATIO = (
    20.0  # one token that the policy has left far behind does not make the sums infinite
)


def advantages(rewards: Tensor, config: AlgorithmConfig) -> Tensor:
    """Rewards [members] of one group, minus their mean, divided by their (population) standard deviation if set.

    A group of one, or of equal rewards, has advantages of zero.
    """
    centred = rewards - rewards.mean()
    if not config.normalize_std:
        return centred
    std = centred.square().mean().sqrt()
    return torch.where(std > STD_FLOOR, centred / std.clamp(min=STD_FLOOR), 0.0)


def weights(lengths: Tensor, config: AlgorithmConfig) -> Tensor:
    """What a token counts: the same everywhere ("token"), or its share of its sequence ("sequence"). [sequences]"""
    if config.loss_aggregation == "token":
        return torch.ones_like(lengths, dtype=torch.float64)
    return 1.0 / lengths.clamp(min=1).double()


def denominator(lengths: Tensor, config: AlgorithmConfig) -> float:
    """The number of tokens ("token") or of sequences that have any ("sequence")."""
    if config.loss_aggregation == "token":
        return float(lengths.sum())
    return float((lengths > 0).sum())


def loss(batch: TokenBatch, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (PPO, https://arxiv.org/abs/1707.06347, equation 7), as a weighted sum over tokens."""
    log_ratio = (batch.logprobs - batch.behaviour_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    total = -(batch.weights * surrogate).sum()
    with torch.no_grad():
        cut = clipped * batch.advantages < ratio * batch.advantages  # there the gradient is zero
        sums = {
            "clip_fraction": cut.sum(),
            "ratio_mean": ratio.sum(),
            # The k3 estimate of KL(sampler ‖ trainer), http://joschu.net/blog/kl-approx.html
            "kl_sampler": (ratio - 1.0 - log_ratio).sum(),
            "entropy": batch.entropy.sum(),
        }
    if config.entropy_coefficient:
        total = total - config.entropy_coefficient * (batch.weights * batch.entropy).sum()
    return total, sums
