"""Group relative policy optimization (GRPO).

Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1: the baseline of a sample is the mean return of its
group, in units of the group's standard deviation, and the policy ratio is clipped as in PPO. The loss is the mean over
tokens here (DAPO, section 3.3), not over sequences as in the paper, unless loss_aggregation = "sequence".
"""

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Episodes, Targets
from actors.algorithms.estimates import centre_by_group, of_tokens
from actors.algorithms.objective import METRICS, clipped_loss

__all__ = ["METRICS", "advantages", "loss"]


def advantages(episodes: Episodes, config: AlgorithmConfig) -> Targets:
    """A group of one, or of equal returns, has advantages of zero."""
    return Targets(of_tokens(centre_by_group(episodes.returns, episodes.groups), episodes, config))


loss = clipped_loss
