"""A tensor on a device that is to be sent, before it is known to whom, and so by which way."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from channels.tensors.cuda_ipc import DeviceFrame
    from channels.tensors.devices import Device


class TensorFrame:
    """The bytes of a tensor, where they are: neither may be changed while it lives.

    tensor: uint8 [nbytes]      ready: its content is there from then on
    lent: what it is for peers that see this GPU's pool, once there was one
    """

    __slots__ = ("_device", "lent", "nbytes", "ready", "tensor")

    def __init__(self, device: "Device", tensor: torch.Tensor) -> None:
        self._device = device
        self.tensor = bytes_of(tensor)
        self.nbytes = self.tensor.nbytes
        self.ready = device.event()
        self.ready.record(device.stream())
        self.lent: DeviceFrame | None = None

    @property
    def view(self) -> memoryview:
        """The bytes on the host, for receivers that no other way leads to. Waits for the copy."""
        self.ready.wait(self._device.stream())
        return memoryview(self.tensor.cpu().numpy())  # type: ignore[arg-type]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's elements, in order, as uint8: the tensor itself where that is possible."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8)
