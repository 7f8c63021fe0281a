"""The [algorithm] section of a job."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section


class AlgorithmConfig(Section, frozen=True, kw_only=True):
    """How rewards become gradients."""

    name: str = "grpo"
    """The algorithm's file in actors/algorithms."""
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """The ratio is clipped below at 1 - clip_low (PPO, arXiv:1707.06347, section 3)."""
    clip_high: Annotated[float, Meta(gt=0)] = 0.2
    """The ratio is clipped above at 1 + clip_high (clip-higher: DAPO, arXiv:2503.14476, section 3.1)."""
    normalize_std: bool = True
    """Divide advantages by the group's standard deviation (GRPO, arXiv:2402.03300, section 4.1.2); False is Dr. GRPO
    (arXiv:2503.20783)."""
    loss_aggregation: str = "token"
    """"token": mean over all tokens of the step (DAPO, section 3.3). "sequence": mean over sequences of the mean
    over their tokens (GRPO, equation 3)."""
    entropy_coefficient: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of the entropy bonus."""
