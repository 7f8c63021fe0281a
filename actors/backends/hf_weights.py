"""The weights of a model: replaced in place by name, moved off the device and back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from channels.errors import WeightsMismatch
from channels.weights.delta import WeightsDelta


class ModelWeights:
    """The parameters of a model that lives on `device` while it is resident.

    buffers: the persistent ones are weights too
    """

    def __init__(self, model: Any, device: torch.device, *, buffers: bool = False) -> None:
        self._model = model
        self._device = device
        self._buffers = buffers
        self.resident = True
        self._names: list[str] = []  # of the last full state: what a delta is to
        self._size_bytes = sum(tensor.nbytes for tensor in self._tensors())

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Copy every parameter by its Hugging Face name; tied ones once, under any of their names.

        Raises ValueError that names what is missing, unexpected, given twice or of another shape;
        nothing is copied then. Other dtypes are converted.
        """
        parameters = self._named()
        canonical: dict[int, str] = {}  # a tied parameter goes by the first of its names
        for name, parameter in parameters.items():
            canonical.setdefault(id(parameter), name)
        given: dict[str, str] = {}
        problems = []
        for name, tensor in weights.items():
            if name not in parameters:
                problems.append(f"{name} is no parameter of the model")
                continue
            parameter = parameters[name]
            first = given.setdefault(canonical[id(parameter)], name)
            if first != name:
                problems.append(f"{name} is tied to {first}, which is given too")
            if tensor.shape != parameter.shape:
                problems.append(
                    f"{name} has shape {list(tensor.shape)} where the model has "
                    f"{list(parameter.shape)}"
                )
        missing = [name for name in canonical.values() if name not in given]
        problems += [f"{name} is missing" for name in missing]
        if problems:
            listed = "; ".join(problems[:8])
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(
                f"weights do not fit {type(self._model).__name__}: {listed}{more}. "
                "Send every parameter once under its Hugging Face name, from the same model config"
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                parameters[name].data.copy_(tensor, non_blocking=True)
        if self._device.type == "cuda":
            # The caller may reuse its host tensors as soon as this returns.
            torch.cuda.synchronize(self._device)
        self._names = list(weights)

    def apply(self, delta: WeightsDelta) -> None:
        """Change what was loaded into the delta's version.

        Raises WeightsMismatch when that was not the delta's base; then a full state has to be loaded.
        """
        if not self._names:
            raise WeightsMismatch("a delta came before any full state")
        parameters = self._named()
        with torch.no_grad():
            delta.apply({name: parameters[name].data for name in self._names})

    def in_place(self) -> dict[str, Tensor]:
        """What versions can be written into on the device, tied ones by the first of their names."""
        if not self.resident:
            return {}
        first: dict[int, str] = {}
        named = self._named()
        for name, tensor in named.items():
            first.setdefault(id(tensor), name)
        return {name: named[name].data for name in first.values()}

    def replaced(self) -> None:
        """All of `in_place` was written."""
        self._names = list(self.in_place())

    def offload(self) -> None:
        """Move a GPU's weights to the host. On CPU they stay, for device and host are one."""
        self.resident = False
        if self._device.type == "cpu":
            return
        for tensor in self._tensors():
            tensor.data = _to_host(tensor.data)
        torch.cuda.empty_cache()

    def onload(self) -> None:
        """Move the weights back to the device."""
        if self._device.type != "cpu":
            for tensor in self._tensors():
                tensor.data = tensor.data.to(self._device, non_blocking=True)
            torch.cuda.synchronize(self._device)
        self.resident = True

    def memory_bytes(self) -> int:
        """Bytes of weights on the device; tied ones count once. Cheap: an actor asks at every stop."""
        return self._size_bytes if self.resident or self._device.type == "cpu" else 0

    def _named(self) -> dict[str, Tensor]:
        """What is loaded by name, tied ones under each of theirs."""
        parameters: dict[str, Tensor] = dict(self._model.named_parameters(remove_duplicate=False))
        if not self._buffers:
            return parameters
        kept = self._model.state_dict(keep_vars=True)
        return parameters | {
            name: kept[name] for name, _ in self._model.named_buffers() if name in kept
        }

    def _tensors(self) -> list[Tensor]:
        """Parameters and buffers, each once."""
        return [*self._model.parameters(), *self._model.buffers()]


def _to_host(tensor: Tensor) -> Tensor:
    """A host copy, pinned where the host has room for it: coming back is several times faster."""
    try:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
    host.copy_(tensor)
    return host
