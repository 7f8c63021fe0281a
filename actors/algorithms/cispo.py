"""Clipped importance sampling policy optimization (CISPO).

MiniMax 2025, https://arxiv.org/abs/2506.13585, section 3.1, equations 4 and 5: REINFORCE on every token, weighed by its
importance ratio, which is clipped and has no gradient. So a rare token keeps its gradient where PPO would cut it.
"""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import TokenBatch
from actors.algorithms.grpo import advantages
from actors.algorithms.objective import METRICS, assemble
from actors.algorithms.ratios import policy_ratio, proximal_logprobs
from actors.algorithms.rloo import LOGPROB_BOUND

__all__ = ["METRICS", "advantages", "loss"]


def loss(batch: TokenBatch, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus clipped ratio (no gradient) times advantage times log-prob; "clip_fraction" is of clipped ratios."""
    assert config.clip_high is not None
    low = 0.0 if config.clip_low is None else 1.0 - config.clip_low
    ratio = policy_ratio(batch, config).detach()
    bounded = ratio.clamp(low, 1.0 + config.clip_high)
    surrogate = bounded * batch.advantages * batch.logprobs.clamp(-LOGPROB_BOUND, LOGPROB_BOUND)
    with torch.no_grad():
        trained = proximal_logprobs(batch, config)
    return assemble(batch, config, surrogate, ratio != bounded, trained)
