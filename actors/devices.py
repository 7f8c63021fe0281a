"""The GPU of an actor, for what goes from device memory to device memory."""

from typing import TYPE_CHECKING

from channels.lifecycle import ActorSpec

if TYPE_CHECKING:
    from channels.tensors.devices import Device


def on_gpu(spec: ActorSpec) -> bool:
    """Whether the actor computes on one."""
    return any(device.startswith("cuda") for device in spec.devices)


def gpu_of(spec: ActorSpec) -> "Device":
    """The first GPU of the actor, which is what its process sees as the first. Raises DeviceError."""
    from channels.tensors.devices import CudaDevice

    return CudaDevice(0)
