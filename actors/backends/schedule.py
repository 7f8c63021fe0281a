"""The learning rate of a step."""

import math

from actors.trainer.config import TrainerConfig


def learning_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
    """Of a step counted from 0: a linear rise over `lr_warmup_steps`, then constant, or half a cosine down to
    `lr_min_fraction` of the peak at the last of `total_steps` (SGDR, arXiv:1608.03983, equation 5, without restarts).
    """
    rise = config.lr_warmup_steps
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = min(1.0, (step - rise) / max(total_steps - 1 - rise, 1))
    low = config.lr_min_fraction
    return config.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * done)) / 2)
