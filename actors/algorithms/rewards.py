"""What is taken off a reward before advantages: the soft overlong punishment."""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig


def soft_overlong_penalty(lengths: Tensor, config: AlgorithmConfig) -> Tensor:
    """DAPO, https://arxiv.org/abs/2503.14476, section 3.4, equation 13: 0 up to overlong_max_tokens less the cache,
    from there down to -1 at overlong_max_tokens, and -1 beyond.

    lengths: [samples], tokens sampled. Returns [samples]
    """
    if not config.overlong_max_tokens:
        return torch.zeros(len(lengths), dtype=torch.float64)
    allowed = config.overlong_max_tokens - config.overlong_cache_tokens
    return ((allowed - lengths.double()) / config.overlong_cache_tokens).clamp(-1.0, 0.0)
