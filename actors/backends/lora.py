"""A LoRA adapter on a transformers model: small trained matrices beside frozen ones (arXiv:2106.09685)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from actors.models.config import LoraConfig

NAME = "default"  # peft's, where there is one adapter


class LoraAdapter:
    """Puts an adapter, drawn from a seed, on the linear layers of a model; what the model was is frozen from then on.

    compute_dtype: of the frozen weights; the adapter stays in the model's own

    Raises ValueError where peft is not installed, or `target_modules` name no layer of the model.
    """

    def __init__(
        self, model: Any, config: LoraConfig, *, seed: int, compute_dtype: torch.dtype
    ) -> None:
        try:
            import peft
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ValueError(
                "[model.lora] needs the package peft: install flowd with its extra `lora`"
            ) from error
        masters = next(model.parameters()).dtype
        targets = config.target_modules
        given = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(given, model)
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        model.requires_grad_(False)
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.to(masters)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(compute_dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by the layer's name, "A" [rank, in] and "B" [out, rank]."""
        return {
            f"{name}.lora_{part}": getattr(layer, f"lora_{part}")[NAME].weight
            for name, layer in self._layers.items()
            for part in ("A", "B")
        }

    def base(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is frozen, by the names that it had before; tied ones once."""
        return {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }

    @torch.no_grad()
    def merged(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The weights with the adapter in them: W + alpha / rank · B A in the adapter's precision, cast to the base's.

        Of a sharded weight each rank merges its shard; nothing is sent.
        """
        changed = {f"{name}.weight": layer for name, layer in self._layers.items()}
        for name, weight in self.base(model).items():
            layer = changed.get(name)
            if layer is None:
                yield name, weight.detach()
                continue
            low, high = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            if not isinstance(weight, DTensor):
                merged = weight.to(low.dtype) + high @ low * layer.scaling[NAME]
                yield name, merged.to(weight.dtype)
                continue
            part = weight.to_local()
            rank, ranks = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
            rows = -(-weight.shape[0] // ranks)  # as torch.chunk cuts
            merged = part.to(low.dtype)
            merged = merged + high[rank * rows :][: len(part)] @ low * layer.scaling[NAME]
            yield (
                name,
                DTensor.from_local(
                    merged.to(part.dtype),
                    weight.device_mesh,
                    weight.placements,
                    run_check=False,
                    shape=weight.shape,
                    stride=weight.stride(),
                ),
            )

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is what it was without the adapter. Without gradients only."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)
