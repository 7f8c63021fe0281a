"""The critic of a training engine: values of states, from the hidden states of a transformers causal LM."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """A linear head on hidden states: on the policy's own, or on those of a trunk that began as a copy of it.

    The head begins at zero, so the first values are zero.
    """

    def __init__(self, model: Any, *, own_trunk: bool) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(model.get_decoder()) if own_trunk else None
        embeddings = model.get_input_embeddings().weight
        self.head = nn.Linear(
            model.config.hidden_size, 1, dtype=embeddings.dtype, device=embeddings.device
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden], the trunk's or the policy's. Returns values [n], in the head's own precision."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.head(hidden.to(self.head.weight.dtype))[:, 0]
        return values
