"""Errors of tensors on devices."""

from channels.errors import ChannelError


class DeviceError(ChannelError):
    """Raised when the driver refuses what was asked of a GPU; says the call and its result."""


class DeviceUnreachable(DeviceError):
    """Raised at a receiver that cannot reach the memory of another GPU: what lies there must come another way."""
