"""GRPO done right (Dr. GRPO).

Liu et al. 2025, https://arxiv.org/abs/2503.20783, section 3.2: GRPO without its two divisions. Not dividing by the
standard deviation, groups that are too easy or too hard count no more than others; not dividing by a sample's own
length, long wrong answers are not favoured. `sum_length` is the constant that takes the length's place.
"""

from actors.algorithms.grpo import advantages
from actors.algorithms.objective import METRICS, clipped_loss

__all__ = ["METRICS", "advantages", "loss"]
loss = clipped_loss
