"""AdamW on master weights: divides, clips and applies gradients that were summed, and saves its moments by name."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from actors.backends.ranks import Ranks
from actors.backends.sharding import local, part_of
from actors.trainer.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Over this rank's shards of named parameters, or over whole ones.

    Gradients of sharded ones are summed over the ranks when they come here, those of whole ones are not yet.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], config: TrainerConfig, ranks: Ranks
    ) -> None:
        self._parameters = dict(parameters)
        self._max_grad_norm = config.max_grad_norm
        self._ranks = ranks
        # The fused kernel takes sharded ones or whole ones: a critic in shards beside an adapter that is whole.
        kinds: dict[bool, list[Tensor]] = {}
        for parameter in self._parameters.values():
            kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
        self._adam = torch.optim.AdamW(
            [{"params": kind} for kind in kinds.values()],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def forget_gradients(self) -> None:
        """They are made anew by the next backward pass."""
        self._adam.zero_grad(set_to_none=True)

    def update(
        self, learning_rate: float, denominator: float, *, loss: float, tokens: float
    ) -> float:
        """Divide, clip, apply and forget the gradients; returns their norm before clipping.

        Where loss or norm is not finite, or no token was trained, the weights and moments stay.
        """
        parts: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            (parts if isinstance(parameter, DTensor) else whole).append(local(parameter.grad))
        self._sum_over_ranks(whole)
        gradients = [*parts, *whole]
        torch._foreach_div_(gradients, max(denominator, 1.0))
        norm = float(self._norm(parts, whole))
        if norm > self._max_grad_norm:
            torch._foreach_mul_(gradients, self._max_grad_norm / (norm + 1e-6))
        if np.isfinite((loss, norm)).all() and tokens:
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
        self.forget_gradients()
        return norm

    def _norm(self, parts: list[Tensor], whole: list[Tensor]) -> Tensor:
        """Of all gradients together: of those in parts, over the ranks."""
        norms = torch._foreach_norm(whole) if whole else ()
        if parts:
            squares = torch.stack(torch._foreach_norm(parts)).square().sum()
            norms = (*norms, self._ranks.sum_(squares).sqrt())
        return torch.linalg.vector_norm(torch.stack(norms))

    def _sum_over_ranks(self, gradients: list[Tensor]) -> None:
        if self._ranks.group is None or not gradients:
            return
        flat = self._ranks.sum_(torch.cat([gradient.flatten() for gradient in gradients]))
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def moments(self) -> tuple[int, dict[str, Tensor]]:
        """How many updates there were, and after one "exp_avg.*" and "exp_avg_sq.*" by parameter, not copied."""
        updates = 0
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            kept = self._adam.state.get(parameter)
            if kept:
                updates = int(kept["step"])
                found |= {f"{moment}.{name}": kept[moment] for moment in MOMENTS}
        return updates, found

    def load_moments(self, updates: int, state: Mapping[str, Tensor]) -> None:
        """Restore `moments`; none after no update."""
        self._adam.state.clear()
        if not updates:
            return
        for name, parameter in self._parameters.items():
            # The fused kernel wants its counter beside the parameter.
            kept = {"step": torch.tensor(float(updates), device=parameter.device)}
            for moment in MOMENTS:
                kept[moment] = torch.empty_like(parameter, requires_grad=False)
                kept[moment].copy_(part_of(state[f"{moment}.{name}"], parameter))
            self._adam.state[parameter] = kept

    def tensors(self) -> list[Tensor]:
        """All that it keeps."""
        return [
            value
            for kept in self._adam.state.values()
            for value in kept.values()
            if isinstance(value, Tensor)
        ]
