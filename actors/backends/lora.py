"""A LoRA adapter on a transformers model: small trained matrices beside frozen ones (arXiv:2106.09685)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actors.models.config import LoraConfig
from channels.weights.delta import checksum

WRONG_BASE = (
    "the frozen model is not the one that the adapter was trained on, by its checksum: put back what [model] path "
    "had when the job was submitted"
)
ALL_LINEAR = "all-linear"
NAME = "default"  # peft's, where there is one adapter


class LoraAdapter:
    """Puts an adapter, drawn from a seed, on the linear layers of a model; what the model was is frozen from then on.

    compute_dtype: of the frozen weights; the adapter stays in the model's own

    Raises ValueError where peft is not installed, or `target_modules` name no layer of the model, or another kind.
    """

    def __init__(
        self, model: Any, config: LoraConfig, *, seed: int, compute_dtype: torch.dtype
    ) -> None:
        peft = _peft()
        masters = next(model.parameters()).dtype
        targets = config.target_modules
        given = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(given, model)
        self._layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        other = [
            n for n, layer in self._layers.items() if not isinstance(layer.base_layer, nn.Linear)
        ]
        if other:
            raise ValueError(
                f"[model.lora] target_modules name {other[0]}, which is no torch.nn.Linear: name linear layers only"
            )
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


def merge(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with an adapter in them: W + scale · B A, in the adapter's precision; others as they are.

    adapter: "LAYER.lora_A" [rank, in] and "LAYER.lora_B" [out, rank]    base: "LAYER.weight" [out, in] and the rest
    """
    for name, weight in base.items():
        low = adapter.get(f"{name.removesuffix('.weight')}.lora_A")
        if low is None:
            yield name, weight
        else:
            high = adapter[f"{name.removesuffix('.weight')}.lora_B"]
            yield name, weight.to(low.dtype) + high @ low * scale


def base_checksum(base: Mapping[str, Tensor]) -> Tensor:
    """uint8 [16], of the names, dtypes, shapes and bytes of a frozen model: what a state says of it."""
    return torch.frombuffer(bytearray.fromhex(checksum(base)), dtype=torch.uint8)


def save_peft_folder(
    adapter: Mapping[str, Tensor], config: LoraConfig, base: str | None, folder: Path
) -> None:
    """Write a folder for `peft.PeftModel.from_pretrained(model, folder)`.

    adapter: "LAYER.lora_A" and "LAYER.lora_B"    base: the folder of the model that it goes on top of, if it is one
    """
    from safetensors.torch import save_file

    targets = set(config.target_modules)
    if targets == {ALL_LINEAR}:
        targets = {name.split(".")[-2] for name in adapter}
    given = _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=sorted(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir()
    given.save_pretrained(folder)
    save_file(
        {f"base_model.model.{name}.weight": t.contiguous() for name, t in adapter.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "[model.lora] needs the package peft: install flowd with its extra `lora`"
        ) from error
    return peft
