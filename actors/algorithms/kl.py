"""Estimates of KL(policy ‖ reference) from sampled tokens (Schulman, http://joschu.net/blog/kl-approx.html)."""

from torch import Tensor

from actors.algorithms.ratios import log_ratio


def estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """A token's KL. With d = log(policy / reference): k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d. [tokens]

    Means over the policy's own tokens: k1 and k3 are the KL exactly, k2 nearly. Gradients: that of k2, d ∇log π, is on
    average the KL's; that of k3, (1 - exp(-d)) ∇log π, is GRPO's (equation 4); k1 has the value d and k2's gradient,
    for ∇d = ∇log π is zero on average and would pull nowhere.
    """
    d = log_ratio(logprobs, reference_logprobs)
    if estimator == "k3":
        return (-d).exp() - 1.0 + d
    k2 = d.square() / 2.0
    return k2 + (d - k2).detach() if estimator == "k1" else k2
