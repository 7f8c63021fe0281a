"""How far the trainer's policy is from the one that sampled, for every algorithm, always on.

Sums and counts only, so that they add up over micro-batches and ranks; quantiles are read off a histogram.
"""

import math

import torch
from torch import Tensor

from actors.algorithms.ratios import log_ratio

METRICS = ("kl_sampler", "ratio_mean")
QUANTILES = {"ratio_p01": 0.01, "ratio_p50": 0.5, "ratio_p99": 0.99}
BUCKETS = 800
# Log-ratios between two buckets' ends: 3e-5 apart around zero, 3 % apart far from it, up to ±20.
FINEST = 1e-3
_SPAN = math.asinh(20.0 / FINEST)


def measure(logprobs: Tensor, behaviour_logprobs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over tokens by the names in METRICS, and how many log-ratios fell in each bucket. [BUCKETS]"""
    logs = log_ratio(logprobs.detach(), behaviour_logprobs)
    ratio = logs.exp()
    sums = {
        # The k3 estimate of KL(sampler ‖ trainer), http://joschu.net/blog/kl-approx.html
        "kl_sampler": (ratio - 1.0 - logs).sum(),
        "ratio_mean": ratio.sum(),
    }
    places = (torch.asinh(logs.double() / FINEST) / _SPAN + 1.0) / 2.0 * BUCKETS
    bucket = places.nan_to_num(BUCKETS).long().clamp(0, BUCKETS - 1)
    ones = torch.ones_like(places)
    return sums, torch.zeros(BUCKETS, dtype=torch.float64, device=ones.device).index_add_(
        0, bucket, ones
    )


def quantiles(histogram: Tensor) -> dict[str, float]:
    """Ratios (not log-ratios) by the names in QUANTILES: the middle of the bucket; 1 where nothing was counted."""
    reached = histogram.cumsum(0)
    total = float(reached[-1])
    if not total:
        return dict.fromkeys(QUANTILES, 1.0)
    found = {}
    for name, share in QUANTILES.items():
        bucket = int(torch.searchsorted(reached, share * total))
        middle = (min(bucket, BUCKETS - 1) + 0.5) / BUCKETS * 2.0 - 1.0
        found[name] = math.exp(FINEST * math.sinh(middle * _SPAN))
    return found
