"""Distributions of actions whose samples come from given uniform draws. float32 or float64 throughout.

Gaussians live where the action's bounds are -1 and 1; `Bounds` takes their samples to the simulator's units.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from actors.models.action_policy import normals
from actors.models.config import PolicyConfig, bounds

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
LOG_2 = math.log(2.0)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Independent in each dimension; a step's log-prob is the sum over its dimensions. mean, log_std: [..., action]

    squash: the action is tanh of the sample (SAC, arXiv:1801.01290, appendix C). Without, it is the sample cut off at
    -1 and 1, and the log-prob is that of the sample before.
    """

    mean: Tensor
    log_std: Tensor
    squash: bool

    def sample(self, uniforms: Tensor) -> Tensor:
        """Before tanh or cut. uniforms: [..., action]"""
        return self.mean + self.log_std.exp() * normals(uniforms).to(self.mean.dtype)

    def mode(self) -> Tensor:
        """The mean, before tanh or cut."""
        return self.mean

    def action(self, sample: Tensor) -> Tensor:
        """Within -1 and 1."""
        return torch.tanh(sample) if self.squash else sample.clamp(-1.0, 1.0)

    def log_prob(self, sample: Tensor) -> Tensor:
        """[...], of samples [..., action]"""
        apart = (sample - self.mean) * torch.exp(-self.log_std)
        logprobs = -0.5 * apart.square() - self.log_std - HALF_LOG_2PI
        if self.squash:
            logprobs = logprobs - log_tanh_slope(sample)
        return logprobs.sum(-1)

    def entropy(self, sample: Tensor) -> Tensor:
        """[...]. The Gaussian's own; with `squash` plus the logarithm of tanh's slope at the sample, the
        one-sample estimate of its mean, which has no closed form."""
        entropy = (self.log_std + HALF_LOG_2PI + 0.5).expand_as(self.mean)
        if self.squash:
            noise = ((sample - self.mean) * torch.exp(-self.log_std)).detach()
            entropy = entropy + log_tanh_slope(self.mean + self.log_std.exp() * noise)
        return entropy.sum(-1)


def log_tanh_slope(values: Tensor) -> Tensor:
    """log(1 - tanh(x)²), exact also where tanh is 1 up to rounding."""
    return 2.0 * (LOG_2 - values - functional.softplus(-2.0 * values))


@dataclass(frozen=True, slots=True)
class Categorical:
    """logits: [..., choices]"""

    logits: Tensor

    def sample(self, uniforms: Tensor) -> Tensor:
        """int64 [...]. uniforms: [...]"""
        cumulative = self.logits.double().softmax(-1).cumsum(-1)
        drawn = uniforms.unsqueeze(-1) * cumulative[..., -1:]
        # Never beyond the last choice, whatever rounding does to the sum.
        return (cumulative <= drawn).sum(-1).clamp(max=self.logits.shape[-1] - 1)

    def mode(self) -> Tensor:
        """int64 [...], the likeliest; the first of equals."""
        return self.logits.argmax(-1)

    def log_prob(self, choice: Tensor) -> Tensor:
        """[...], of choices int64 [...]"""
        return self.logits.log_softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """[...]"""
        logprobs = self.logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)


class Bounds(nn.Module):
    """Takes actions [..., action] within -1 and 1 to the simulator's units. The bounds are the job's, not weights."""

    low: Tensor
    high: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        low, high = bounds(config)
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("high", torch.tensor(high), persistent=False)

    def forward(self, actions: Tensor) -> Tensor:
        low, high = self.low.to(actions.dtype), self.high.to(actions.dtype)
        return low + (actions + 1.0) * 0.5 * (high - low)
