"""Proximal policy optimization (PPO), with a critic.

Schulman et al. 2017, https://arxiv.org/abs/1707.06347: advantages by GAE (https://arxiv.org/abs/1506.02438) over tokens
or turns, the clipped surrogate (equation 7, with dual clip if set), and a value loss (equation 9), itself clipped
(Engstrom et al. 2020, https://arxiv.org/abs/2005.12729, section 3).
"""

import torch
from torch import Tensor

from actors.algorithms import objective
from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Episodes, Targets, TokenBatch
from actors.algorithms.estimates import episode_advantages

METRICS = (*objective.METRICS, "value_loss", "value_clip_fraction")


def advantages(episodes: Episodes, config: AlgorithmConfig) -> Targets:
    """GAE; values are to become the advantages plus the old values (the lambda-return)."""
    assert episodes.values is not None
    assert episodes.last_values is not None
    estimates = episode_advantages(episodes, episodes.values, episodes.last_values, config)
    return Targets(estimates, estimates + episodes.values)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """Half the squared error, or that of the value moved back to within value_clip of the old one, whichever is larger;
    and where the latter was. [tokens] each"""
    plain = (values - returns).square()
    if not config.value_clip:
        return plain / 2.0, torch.zeros_like(plain, dtype=torch.bool)
    near = old_values + (values - old_values).clamp(-config.value_clip, config.value_clip)
    bounded = (near - returns).square()
    return torch.maximum(plain, bounded) / 2.0, bounded > plain


def loss(batch: TokenBatch, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate and the value loss."""
    assert batch.values is not None
    assert batch.old_values is not None
    assert batch.returns is not None
    total, sums = objective.clipped_loss(batch, config)
    errors, clipped = value_loss(batch.values, batch.old_values, batch.returns, config)
    total = total + config.value_coefficient * (batch.weights * errors).sum()
    return total, {
        **sums,
        "value_loss": errors.detach().sum(),
        "value_clip_fraction": clipped.sum(),
    }
