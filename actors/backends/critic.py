"""The critic of a training engine: values of the states before chosen tokens, from a transformers causal LM."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """A linear head on hidden states: on the policy's own, or on those of a trunk that began as a copy of it.

    The head begins at zero, so the first values are zero. Sharing the policy's trunk, it reads the hidden states of the
    forward pass that it was `watching` last.
    """

    def __init__(self, model: Any, *, own_trunk: bool) -> None:
        super().__init__()
        decoder = model.get_decoder()
        self.trunk = copy.deepcopy(decoder) if own_trunk else None
        embeddings = model.get_input_embeddings().weight
        self.head = nn.Linear(
            model.config.hidden_size, 1, dtype=embeddings.dtype, device=embeddings.device
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._seen: Tensor | None = None

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Keep the hidden states of the policy's forward pass, where the trunk is shared."""
        hook = model.get_decoder().register_forward_hook(self._see)
        try:
            yield
        finally:
            hook.remove()

    def forward(
        self, inputs: Tensor, rows: Tensor, columns: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """inputs: int64 [batch, time], padded on the right    rows, columns: int64 [n], of the tokens asked for
        lengths: int64 [batch]. Returns values before those tokens [n] and after each row's last one [batch]."""
        if self.trunk is not None:
            hidden = self.trunk(input_ids=inputs, use_cache=False).last_hidden_state
        else:
            assert self._seen is not None
            hidden, self._seen = self._seen, None
        with torch.autocast(inputs.device.type, enabled=False):
            dtype = self.head.weight.dtype
            before = self.head(hidden[rows, columns - 1].to(dtype))[:, 0]
            after = self.head(
                hidden[torch.arange(len(inputs), device=inputs.device), lengths - 1].to(dtype)
            )[:, 0]
        return before, after

    def _see(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._seen = output.last_hidden_state
