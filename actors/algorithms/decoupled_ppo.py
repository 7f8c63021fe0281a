"""Decoupled PPO, for asynchronous runs.

Hilton et al. 2021, https://arxiv.org/abs/2110.00641, section 3; AReaL, https://arxiv.org/abs/2505.24298, section 5.2:
PPO in which the policy that sampled and the one that an update must stay near are two. The ratio is clipped against the
proximal policy, recomputed at the start of the step or interpolated, and the loss weighed by its importance weight.
"""

from actors.algorithms.ppo import METRICS, advantages, loss

__all__ = ["METRICS", "advantages", "loss"]
