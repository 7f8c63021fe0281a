"""How policy weights travel from trainer to rollout: the node's host copy, and device memory to device memory."""

from channels.weights.directory import (
    VARIANTS,
    Publication,
    WeightsDirectory,
    WeightsPublished,
)

__all__ = ["VARIANTS", "Publication", "WeightsDirectory", "WeightsPublished"]
