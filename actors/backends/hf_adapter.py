"""Applies a LoRA adapter beside the frozen layers of a model that samples (arXiv:2106.09685).

It is not merged into them: W x + s B A x is computed as the trainer computes it, the adapter in its own precision.
Merged into bfloat16 weights a small change would be rounded away, so that sampler and trainer were two policies, and a
second copy of the base had to be kept to merge the next version into.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

PARTS = ("lora_A", "lora_B")  # [rank, in], [out, rank]


class UnmergedAdapter:
    """The adapter of a model: none at first, then one that is replaced in place. Layers are found by name."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._layers: dict[str, nn.Linear] = {}
        self._scale = 1.0

    @torch.no_grad()
    def load(self, adapter: Mapping[str, Tensor], scale: float) -> None:
        """Use this one from now on. adapter: LAYER.lora_A and LAYER.lora_B    scale: of their product, alpha / rank

        Raises ValueError that names what does not fit the model or the adapter before; nothing is changed then.
        """
        layers = self._fitting(adapter)
        self._scale = scale
        if not self._layers:
            self._attach(layers, adapter)
        for name, layer in layers.items():
            for part in PARTS:
                getattr(layer, part).copy_(adapter[f"{name}.{part}"], non_blocking=True)
        if self._device.type == "cuda":
            # The caller may reuse its host tensors as soon as this returns.
            torch.cuda.synchronize(self._device)

    def clear(self) -> None:
        """The model is what it is without an adapter."""
        for layer in self._layers.values():
            layer.lora_B.zero_()  # type: ignore[operator]

    def size_bytes(self) -> int:
        """Of what it keeps beside the model."""
        return sum(getattr(layer, part).nbytes for layer in self._layers.values() for part in PARTS)

    def _fitting(self, adapter: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
        found: dict[str, nn.Linear] = {}
        problems = []
        modules = dict(self._model.named_modules())
        for name in sorted({key.rpartition(".")[0] for key in adapter}):
            layer = modules.get(name)
            if not isinstance(layer, nn.Linear):
                problems.append(f"{name} is no linear layer of the model")
                continue
            low, high = (adapter.get(f"{name}.{part}") for part in PARTS)
            if (
                low is None
                or high is None
                or low.shape != (high.shape[-1], layer.in_features)
                or high.shape[0] != layer.out_features
            ):
                problems.append(
                    f"{name} needs lora_A [rank, {layer.in_features}] and lora_B [{layer.out_features}, rank]"
                )
                continue
            if self._layers and (
                name not in self._layers or self._layers[name].lora_A.shape != low.shape
            ):
                problems.append(f"{name} has another rank than before, or had no adapter")
            found[name] = layer
        problems += [f"{name} is missing" for name in self._layers if name not in found]
        if problems:
            more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise ValueError(
                f"the adapter does not fit {type(self._model).__name__}: {'; '.join(problems[:4])}{more}. "
                "[model.lora] has to be that of the job, and the model its base"
            )
        return found

    def _attach(self, layers: dict[str, nn.Linear], adapter: Mapping[str, Tensor]) -> None:
        for name, layer in layers.items():
            for part in PARTS:
                given = adapter[f"{name}.{part}"]
                with torch.inference_mode(mode=False):  # an offload replaces its data later
                    buffer = torch.empty(given.shape, dtype=given.dtype, device=self._device)
                # A buffer goes where the layer's weights go; it is not saved with them, nor loaded.
                layer.register_buffer(part, buffer, persistent=False)
            layer.register_forward_hook(self._add)
        self._layers = layers

    def _add(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = linear(linear(inputs[0].to(layer.lora_A.dtype), layer.lora_A), layer.lora_B)
        return (output + change * self._scale).to(output.dtype)
