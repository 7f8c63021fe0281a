"""How a training engine reads a model: log-probs, entropies and values of what was trained, with gradient."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from actors.backends.ranks import Ranks
from actors.backends.training_batches import Float64, GroupsLaidOut, TrainingSequence


class Readings(NamedTuple):
    """Of the trained tokens (or other units) of a batch; log-probs and entropies in the dtype that was asked for.

    logprobs: [trained]    entropies: [trained], of the distributions that they were drawn from
    values: [trained], before those tokens    last_values: [sequences], after each one's last. None without a critic.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    last_values: Tensor | None


class Batch(Protocol):
    """What a model reads of a micro-batch. rows: int64 [trained], whose sequence each trained unit is of"""

    rows: Tensor

    def by_sequence(self, values: Tensor) -> Iterator[tuple[TrainingSequence, Float64]]:
        """Cut what was read for the trained units [trained] into that of each sequence, on the host."""
        ...


class Normalization(Protocol):
    """Statistics of what was trained on, which rewards and observations are normalised by; those of a step count from
    the next one on."""

    def begin(self) -> None:
        """A step begins: forget what a step that was broken off has seen."""
        ...

    def scale(self, laid_out: GroupsLaidOut) -> None:
        """Normalise rewards in place, and see these groups."""
        ...

    def finish(self, ranks: Ranks) -> None:
        """Count what all ranks have seen. Collective."""
        ...


class Reader(nn.Module):
    """A model and what is trained beside it. Called with a batch (of `batch`) and a dtype it gives `Readings`; called
    with None, a zero that next to nothing was computed for, with gradient."""

    model: Any

    @property
    def has_critic(self) -> bool:
        """Whether values are read."""
        raise NotImplementedError

    def batch(self, sequences: list[TrainingSequence], device: torch.device) -> Any:
        """What the model reads of a micro-batch: a `Batch`."""
        raise NotImplementedError

    def beside(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained and not published, by the names of the checkpoint."""
        return {}

    def frozen_copy(self) -> "Reader":
        """The model as it is now, without a critic, never trained."""
        raise NotImplementedError

    def exact(self) -> list[nn.Module]:
        """Modules that compute in the precision of their parameters, whatever the others do."""
        return []

    def transformers(self) -> list[Any]:
        """The transformers models in it, whose blocks may compute activations again in the backward pass."""
        return []

    def compile_blocks(self) -> None:
        """Compile each transformer block's forward pass, without the hooks around it, and what reads the logits."""
        raise ValueError(
            f"{type(self.model).__name__} is not compiled: leave [trainer] compile out"
        )

    def normalization(self, gamma: float) -> Normalization | None:
        """What normalises by running statistics, where the model asks for it."""
        return None
