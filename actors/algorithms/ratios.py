"""Ratios of policies: against the proximal policy, for the trust region, and against the sampler, for corrections.

Three policies (Hilton et al. 2021, https://arxiv.org/abs/2110.00641, section 3): the behaviour policy sampled, the
proximal one is what an update must not leave far behind, the current one is trained.
"""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import TokenBatch

MAX_LOG_RATIO = 20.0  # a token that the policy has left far behind does not make the sums infinite


def log_ratio(left: Tensor, right: Tensor) -> Tensor:
    """left - right, at most MAX_LOG_RATIO either way; zero, without gradient, where both are the same infinity."""
    alike = left.isinf() & (left == right)
    # Replaced before the subtraction: behind it, the gradient of inf - inf would be no number either.
    left, right = left.masked_fill(alike, 0.0), right.masked_fill(alike, 0.0)
    return (left - right).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def pool(values: Tensor, index: Tensor, reduce: str) -> Tensor:
    """The "sum" or "mean" of the values with the same index, at each of them. [tokens]"""
    if not len(values):
        return values
    size = int(index[-1]) + 1
    total = torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, values)
    if reduce == "mean":
        total = total / torch.bincount(index, minlength=size)
    return total[index]


def proximal_logprobs(batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    """Of the policy that the config names, without gradient. [tokens]

    Interpolated (A-3PO, https://arxiv.org/abs/2512.06547): a token sampled d versions ago has 1/d of the behaviour
    policy's log-prob and the rest of the current one's; one sampled by the current version has that version's.
    """
    current = batch.logprobs.detach()
    if config.proximal == "behaviour":
        return batch.behaviour_logprobs
    if config.proximal == "recomputed":
        return current if batch.proximal_logprobs is None else batch.proximal_logprobs
    share = torch.where(batch.staleness > 0, 1.0 / batch.staleness.clamp(min=1), 0.0)
    moved = current + share * log_ratio(batch.behaviour_logprobs, current)
    return torch.where(current.isinf(), current, moved)


def policy_ratio(batch: TokenBatch, config: AlgorithmConfig) -> Tensor:
    """The current policy's ratio to the proximal one, of the token, turn or sequence. [tokens], with gradient"""
    logs = log_ratio(batch.logprobs, proximal_logprobs(batch, config))
    if config.ratio_level == "chunk":
        logs = pool(logs, batch.turns, "sum").clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    elif config.ratio_level == "sequence":
        logs = pool(logs, batch.sequences, "mean")
    return logs.exp()


def correction(
    batch: TokenBatch, trained: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """Importance weights of `trained` log-probs (no gradient) to the behaviour policy's, truncated; zero outside the
    band. Returns them and where they were left out. [tokens] each"""
    # The band is about the trainer and the sampler, whatever the ratio in the loss is taken against.
    logs = log_ratio(trained, batch.behaviour_logprobs)
    weights = torch.ones_like(logs)
    if config.correction != "none":
        powers = logs if config.correction == "token" else pool(logs, batch.sequences, "sum")
        weights = powers.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if config.correction_cap:
            weights = weights.clamp(max=config.correction_cap)
    left_out = torch.zeros_like(logs, dtype=torch.bool)
    if config.mask_level != "none":
        current = log_ratio(batch.logprobs.detach(), batch.behaviour_logprobs)
        if batch.proximal_logprobs is not None:  # not what this step's own updates have changed
            current = log_ratio(batch.proximal_logprobs, batch.behaviour_logprobs)
        if config.mask_level == "sequence":
            current = pool(current, batch.sequences, "mean")
        ratio = current.exp()
        left_out = (ratio < config.mask_low) | (ratio > config.mask_high)
        weights = weights.masked_fill(left_out, 0.0)
    return weights, left_out
