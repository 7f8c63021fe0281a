"""What the trainer asks of an algorithm: pure functions of tensors, no model, no optimizer, no communication.

An algorithm is a module with these functions; `registry` finds it by the name in [algorithm]. Sums are not normalised:
the trainer adds them up over micro-batches and ranks and divides once, so the gradient of a step does not depend on
how its groups were split.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from actors.algorithms.config import AlgorithmConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The trained tokens of a micro-batch, in one row.

    logprobs: [tokens], under the policy that is trained, with gradient
    behaviour_logprobs: [tokens], as they were when sampled
    advantages: [tokens]    weights: [tokens], see `Algorithm.weights`
    entropy: [tokens], with gradient only where the config gives it a weight
    """

    logprobs: "Tensor"
    behaviour_logprobs: "Tensor"
    advantages: "Tensor"
    weights: "Tensor"
    entropy: "Tensor"


class Algorithm(Protocol):
    """The functions of an algorithm's module. METRICS: names of the sums that `loss` gives, always all of them."""

    METRICS: tuple[str, ...]

    def advantages(self, rewards: "Tensor", config: AlgorithmConfig) -> "Tensor":
        """rewards: [members] of one group. Returns [members]."""
        ...

    def weights(self, lengths: "Tensor", config: AlgorithmConfig) -> "Tensor":
        """lengths: [sequences] in tokens. Returns [sequences], what one token of each counts in the loss."""
        ...

    def denominator(self, lengths: "Tensor", config: AlgorithmConfig) -> float:
        """What these sequences add to the denominator that the step's sums are divided by."""
        ...

    def loss(
        self, batch: TokenBatch, config: AlgorithmConfig
    ) -> "tuple[Tensor, dict[str, Tensor]]":
        """The weighted sum over tokens to be minimised, and sums over tokens for metrics (no gradient)."""
        ...
