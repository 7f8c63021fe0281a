"""REINFORCE++ with a baseline.

Hu et al. 2025, https://arxiv.org/abs/2501.03262, section 3: the mean return of the group is subtracted, as in GRPO, and
the result normalised over the whole batch rather than the group; KL to the reference is k2 in the loss.
"""

from actors.algorithms.grpo import advantages
from actors.algorithms.objective import METRICS, clipped_loss

__all__ = ["METRICS", "advantages", "loss"]
loss = clipped_loss
