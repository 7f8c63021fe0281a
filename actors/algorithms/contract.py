"""What the trainer asks of an algorithm: pure functions of tensors, no model, no optimizer, no communication.

An algorithm is a module with these functions; `registry` finds it by the name in [algorithm]. Sums are not normalised:
the trainer adds them up over micro-batches and ranks and divides once, so the gradient of a step does not depend on
how its groups were split. Where `config.scope` is "batch", the trainer normalises advantages by the exact mean and
deviation over the tokens of all ranks, once the whole step is there. Configs given here are resolved.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from actors.algorithms.config import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """What complete groups earned; samples of a group and tokens of a sample are adjacent and in order. All float64.

    returns: [samples], whole returns, also of samples without a trained token    groups: int64 [samples], from 0
    samples: int64 [tokens], of each trained token, as a place in `returns`    turns: int64 [tokens], from 0
    rewards: [tokens], a turn's reward at its last trained token, less the KL penalty where that is in the reward
    values: [tokens], the critic's, before the token; None without a critic
    last_values: [samples], after the last token, 0 where the episode had come to its end
    """

    returns: "Tensor"
    groups: "Tensor"
    samples: "Tensor"
    turns: "Tensor"
    rewards: "Tensor"
    values: "Tensor | None" = None
    last_values: "Tensor | None" = None


@dataclass(frozen=True, slots=True)
class Targets:
    """advantages: [tokens], not yet normalised by the batch    returns: [tokens], what values should be, or None"""

    advantages: "Tensor"
    returns: "Tensor | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The trained tokens of a micro-batch, in one row; tokens of a sequence are adjacent, and all in this batch.

    logprobs: [tokens], under the policy that is trained, with gradient
    behaviour_logprobs: [tokens], as they were when sampled
    advantages: [tokens]    weights: [tokens], what each counts in the loss, see `aggregation`
    entropy: [tokens], with gradient only where the config gives it a weight
    sequences, turns: int64 [tokens], from 0: which sequence of the batch, and which turn of all of them
    staleness: [tokens], versions between the sampling policy and the one at the start of the step
    proximal_logprobs: [tokens], under the policy at the start of the step; None where that is the current one
    reference_logprobs: [tokens], None without a reference
    values (with gradient), old_values, returns: [tokens], None without a critic
    """

    logprobs: "Tensor"
    behaviour_logprobs: "Tensor"
    advantages: "Tensor"
    weights: "Tensor"
    entropy: "Tensor"
    sequences: "Tensor"
    turns: "Tensor"
    staleness: "Tensor"
    proximal_logprobs: "Tensor | None" = None
    reference_logprobs: "Tensor | None" = None
    values: "Tensor | None" = None
    old_values: "Tensor | None" = None
    returns: "Tensor | None" = None


class Algorithm(Protocol):
    """The functions of an algorithm's module. METRICS: names of the sums that `loss` gives, always all of them."""

    METRICS: tuple[str, ...]

    def advantages(self, episodes: Episodes, config: AlgorithmConfig) -> Targets:
        """What each trained token did better than expected."""
        ...

    def loss(
        self, batch: TokenBatch, config: AlgorithmConfig
    ) -> "tuple[Tensor, dict[str, Tensor]]":
        """The weighted sum over tokens to be minimised, and sums over tokens for metrics (no gradient)."""
        ...
