"""Decoupled clip and dynamic sampling policy optimization (DAPO).

Yu et al. 2025, https://arxiv.org/abs/2503.14476: GRPO clipped higher above than below (3.1), averaged over tokens
(3.3), with a soft punishment of overlong answers (3.4, the settings overlong_*), without KL. Which groups dynamic
sampling (3.2) keeps, and that others are sampled instead, is the conductor's: `actors.conductor.filtering`.
"""

from actors.algorithms.grpo import advantages
from actors.algorithms.objective import METRICS, clipped_loss

__all__ = ["METRICS", "advantages", "loss"]
loss = clipped_loss
