"""Host copies of a trainer's state, so that it can be written to disk while the training goes on."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True)
class Staged:
    """A state as it was when it was copied.

    layout: the tensors that were copied, for their shapes and places on a mesh; what they hold may have changed since
    host: this rank's part of each, by name, on the host
    """

    layout: Mapping[str, Tensor]
    host: Mapping[str, Tensor]


class HostCopy:
    """The buffers of a copy, kept for the next one: fresh memory costs more than the copying, pinned even more."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Tensor]) -> Staged:
        """Copy a state; once this returns the originals may change.

        The copy of the call before is overwritten: it has to be on disk by then.
        """
        devices = set()
        host = {}
        for name, tensor in state.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                pinned = local.device.type == "cuda"
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
            if local.device.type == "cuda":
                devices.add(local.device)
            host[name] = buffer
        for device in devices:
            torch.cuda.synchronize(device)
        return Staged(layout=dict(state), host=host)
