"""Errors of the channels package."""


class ChannelError(Exception):
    """Raised when a channel or endpoint cannot do what was asked of it."""


class PeerLost(ChannelError):
    """Raised when the other end of a call or stream died or was disconnected."""


class Closed(ChannelError):
    """Raised when something is put into, or taken from, a channel that was closed."""


class Withdrawn(ChannelError):
    """Raised at an awaited call whose item its own producer cancelled."""


class Refused(ChannelError):
    """Raised at an awaited call whose item the consumer could not read; says why."""


class TooLarge(ChannelError, ValueError):
    """Raised at the sender when an item is larger than the channel's limit; says both sizes."""


class BadFrame(ChannelError, ValueError):
    """Raised when bytes from a socket are not a message of ours."""


class VersionGone(ChannelError):
    """Raised when a version of the weights was deleted before, or while, it was opened."""


class WeightsMismatch(ChannelError):
    """Raised when a delta of the weights does not lead from what a receiver holds to the version."""
