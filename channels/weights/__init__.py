"""How policy weights travel from trainer to rollout: the node's host copy, and device memory to device memory."""

from channels.weights.directory import WeightsDirectory, WeightsPublished

__all__ = ["WeightsDirectory", "WeightsPublished"]
