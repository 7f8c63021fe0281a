"""What the losses of all algorithms are put together from, as weighted sums over tokens."""

import torch
from torch import Tensor

from actors.algorithms import kl
from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import TokenBatch
from actors.algorithms.ratios import correction, policy_ratio, proximal_logprobs

METRICS = ("clip_fraction", "correction_mean", "masked_fraction", "kl_reference", "entropy")


def clipped(ratio: Tensor, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (PPO, https://arxiv.org/abs/1707.06347, equation 7), with dual clip if set
    (https://arxiv.org/abs/1912.09729), and where it has no gradient. [tokens] each"""
    assert config.clip_low is not None
    assert config.clip_high is not None
    plain = ratio * advantages
    bounded = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * advantages
    surrogate, cut = torch.minimum(plain, bounded), bounded < plain
    if config.dual_clip:
        floor = config.dual_clip * advantages
        below = (advantages < 0) & (surrogate < floor)
        surrogate, cut = torch.where(below, floor, surrogate), cut | below
    return surrogate, cut


def clipped_loss(batch: TokenBatch, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all algorithms that clip a policy ratio as PPO does."""
    surrogate, cut = clipped(policy_ratio(batch, config), batch.advantages, config)
    return assemble(batch, config, surrogate, cut, proximal_logprobs(batch, config))


def assemble(
    batch: TokenBatch, config: AlgorithmConfig, surrogate: Tensor, cut: Tensor, trained: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the surrogate [tokens], corrected for the sampler; plus KL to the reference, less the entropy bonus.

    cut: where the surrogate has no gradient    trained: log-probs that importance weights are taken of
    """
    importance, left_out = correction(batch, trained, config)
    total = -(batch.weights * importance * surrogate).sum()
    zero = torch.zeros((), dtype=batch.weights.dtype, device=batch.weights.device)
    kl_sum = zero
    if batch.reference_logprobs is not None:
        divergence = kl.estimate(
            batch.logprobs, batch.reference_logprobs, config.kl_estimator or "k3"
        )
        kl_sum = divergence.detach().sum()
        if config.kl_place == "loss":
            total = total + config.kl_coefficient * (batch.weights * divergence).sum()
    if config.entropy_coefficient:
        total = total - config.entropy_coefficient * (batch.weights * batch.entropy).sum()
    return total, {
        "clip_fraction": cut.sum(),
        "correction_mean": importance.sum(),
        "masked_fraction": left_out.sum(),
        "kl_reference": kl_sum,
        "entropy": batch.entropy.detach().sum(),
    }
