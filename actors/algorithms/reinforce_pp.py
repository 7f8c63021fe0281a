"""REINFORCE++.

Hu et al. 2025, https://arxiv.org/abs/2501.03262, section 3: no critic and no groups. A token's advantage is what the
sample earned from it on, less the KL penalties of the tokens from it on (k1, in the reward), normalised over the tokens
of the whole batch; the policy ratio is clipped as in PPO.
"""

import torch

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Episodes, Targets
from actors.algorithms.estimates import generalized_advantages
from actors.algorithms.objective import METRICS, clipped_loss

__all__ = ["METRICS", "advantages", "loss"]


def advantages(episodes: Episodes, config: AlgorithmConfig) -> Targets:
    """Rewards to go, discounted by gamma."""
    return Targets(
        generalized_advantages(
            episodes.rewards,
            torch.zeros_like(episodes.rewards),
            torch.zeros_like(episodes.returns),
            episodes.samples,
            gamma=config.gamma,
            lambda_=1.0,
        )
    )


loss = clipped_loss
