"""What two endpoints say to each other about device tensors. Known to every process, also to those without torch."""

from channels.messages import Message


class DeviceMessage(Message, frozen=True):
    """Between two endpoints of which one has tensors on a GPU."""


class DeviceOffered(DeviceMessage, frozen=True, tag="device_offered"):
    """Sender to receiver: tensors would come in this memory; can you reach it?"""

    offer: bytes


class DeviceAnswered(DeviceMessage, frozen=True, tag="device_answered"):
    """Receiver to sender: yes, or why not."""

    reaches: bool
    reason: str = ""


class DeviceReturned(DeviceMessage, frozen=True, tag="device_returned"):
    """Receiver to sender: these blocks of your pool are no longer looked at here."""

    blocks: tuple[int, ...]


class NcclOffered(DeviceMessage, frozen=True, tag="nccl_offered"):
    """Sender to receiver: tensors would come over this version of NCCL from this GPU; can you take them?"""

    uuid: str
    version: int


class NcclAnswered(DeviceMessage, frozen=True, tag="nccl_answered"):
    """Receiver to sender: yes, or why not."""

    reaches: bool
    reason: str = ""


class NcclTaken(DeviceMessage, frozen=True, tag="nccl_taken"):
    """Receiver to sender: these transfers are here, and need not be kept; those have to come another way, and why."""

    arrived: tuple[int, ...] = ()
    missed: tuple[int, ...] = ()
    reason: str = ""


class LinkClosed(DeviceMessage, frozen=True, tag="nccl_link_closed"):
    """Either end to the other: this link is not used any more. outgoing: it leads to the receiver of this message.

    reason: empty when it was idle
    """

    generation: int
    outgoing: bool
    reason: str = ""
