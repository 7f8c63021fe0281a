"""REINFORCE leave-one-out (RLOO).

Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740, section 3.3 (the estimator of Kool et al. 2019): the baseline
of a sample is the mean return of the others of its group; a whole answer is one action, whose log-prob is the sum over
its tokens. There is no ratio and no clipping; `correction` weighs samples of an older policy.
"""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Episodes, Targets, TokenBatch
from actors.algorithms.estimates import leave_one_out, of_tokens
from actors.algorithms.objective import METRICS, assemble

__all__ = ["METRICS", "advantages", "loss"]
LOGPROB_BOUND = 1e4  # a token of probability zero: finite, without gradient


def advantages(episodes: Episodes, config: AlgorithmConfig) -> Targets:
    """A group of one, or of equal returns, has advantages of zero."""
    return Targets(of_tokens(leave_one_out(episodes.returns, episodes.groups), episodes, config))


def loss(batch: TokenBatch, config: AlgorithmConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE: minus the advantage times the log-prob."""
    surrogate = batch.advantages * batch.logprobs.clamp(-LOGPROB_BOUND, LOGPROB_BOUND)
    cut = torch.zeros_like(surrogate, dtype=torch.bool)
    return assemble(batch, config, surrogate, cut, batch.logprobs.detach())
