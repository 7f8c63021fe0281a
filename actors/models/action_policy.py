"""What rollout and trainer ask of a policy that acts on arrays: chunks of actions, and their log-probs again later.

    acted = policy.act(observations, uniforms, greedy=False)          # rollout, no gradient
    read = policy.evaluate(observations, acted.recompute)             # trainer, with gradient

Contract:
* A *unit* is what has one log-prob: a step of the chunk (a Gaussian's dimensions together), or an action token. Units
  are in order of the chunk's steps, `units_per_step` for each. What is trained, masked and clipped are units.
* `evaluate` of what `act` gave, with the same weights, is the same log-probs up to rounding: `recompute` holds all that
  is needed beyond the observation (the sample before clipping, a flow model's states), and nobody else reads it.
  Action tokens, which others may look at, travel as such, and come back in `recompute` as "tokens".
* All randomness of `act` comes from `uniforms`, so that a draw depends on its key and not on its company.
* Buffers are part of the policy: they travel with the weights and stand in the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from actors.models.running_moments import RunningMoments

Observations = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """What a policy did. batch is that of the observations, units = chunk * units_per_step.

    actions: float32 [batch, chunk, action] within the bounds, or int64 [batch, chunk] where they are discrete
    tokens: int64 [batch, units], the action tokens; None for a policy without
    logprobs: float32 [batch, units], under the distribution that was sampled from    values: float32 [batch]
    recompute: [batch, ...] each
    """

    actions: Tensor
    logprobs: Tensor
    values: Tensor
    tokens: Tensor | None = None
    recompute: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a policy thinks of actions, with gradient. logprobs, entropy: [batch, units]    values: [batch]"""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class ActionPolicy(nn.Module):
    """See the module docstring.

    chunk: steps that `act` gives    draws: uniform numbers that it takes for an observation
    """

    chunk: int
    units_per_step: int
    draws: int
    returns: RunningMoments | None
    """Of discounted returns; the trainer divides rewards by their deviation. None leaves rewards as they are."""

    def act(self, observations: Observations, uniforms: Tensor, *, greedy: bool) -> Acted:
        """observations: [batch, ...] by name    uniforms: float64 [batch, draws] in [0, 1)
        greedy: the likeliest actions; `uniforms` is not read."""
        raise NotImplementedError

    def evaluate(self, observations: Observations, recompute: Mapping[str, Tensor]) -> Read:
        """The log-probs of actions again. recompute: as `act` gave it, [batch, ...] each."""
        raise NotImplementedError

    def value(self, observations: Observations) -> Tensor:
        """The critic's estimate of each observation. float [batch]"""
        raise NotImplementedError

    def observed(self) -> dict[str, RunningMoments]:
        """Running moments that observations are normalised by; the trainer adds to them after every step."""
        return {}

    def rows(self, observations: Observations) -> dict[str, Tensor]:
        """What each of `observed` sees of these observations: [batch, size], by the same names."""
        return {}


def normals(uniforms: Tensor) -> Tensor:
    """Standard normal draws, one for each uniform one, by the inverse of the distribution function. float64"""
    # The largest double below 1 keeps a draw of 0 finite: -8.2 deviations.
    inner = uniforms.clamp(2.0**-54, 1.0 - 2.0**-53)
    return torch.special.ndtri(inner)
