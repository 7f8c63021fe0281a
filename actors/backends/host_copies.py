"""Moves tensors off a GPU and back, in place: whoever holds them holds them still."""

from collections.abc import Sequence

import torch
from torch import Tensor


class HostCopies:
    """Pinned memory is slow to make and several times faster to copy from, so it is kept for the next time."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def move_to_host(self, tensors: Sequence[Tensor]) -> None:
        """Each is on the host afterwards, its memory on the GPU free."""
        for place, tensor in enumerate(tensors):
            copy = self._kept.get(place)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._kept[place] = copy
            copy.copy_(tensor.data, non_blocking=True)
        torch.cuda.synchronize()
        for place, tensor in enumerate(tensors):
            tensor.data = self._kept[place]
        torch.cuda.empty_cache()

    def move_back(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Each is on the device again."""
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
