"""Sums over the ranks of a training engine."""

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of a process group that share a step, or one alone (group None)."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self._device = device
        self._reaches_device = device.type == "cpu" or (
            group is not None and dist.get_backend(group) == "nccl"
        )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks in place; by way of the host where the group cannot reach the device."""
        if self.group is None:
            return tensor
        if self._reaches_device:
            dist.all_reduce(tensor, group=self.group)
        else:
            on_host = tensor.cpu()
            dist.all_reduce(on_host, group=self.group)
            tensor.copy_(on_host)
        return tensor

    def sum_on_host(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of a tensor on the host, there again; by way of the device where that talks."""
        if self.group is None:
            return tensor
        return self.sum_(tensor.to(self._device)).cpu()
