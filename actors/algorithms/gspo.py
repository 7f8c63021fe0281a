"""Group sequence policy optimization (GSPO).

Zheng et al. 2025, https://arxiv.org/abs/2507.18071, section 4.1: GRPO with one ratio per sequence, the geometric
mean of its tokens' (equation 7), clipped as a whole (equation 5). A sequence is what the model reads at once: of an
episode that came in several segments each has a ratio of its own.
"""

from actors.algorithms.grpo import advantages
from actors.algorithms.objective import METRICS, clipped_loss

__all__ = ["METRICS", "advantages", "loss"]
loss = clipped_loss
