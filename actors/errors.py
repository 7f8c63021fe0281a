"""Errors of the actors package."""


class ActorError(Exception):
    """Raised when an actor cannot do its work."""


class LeaseViolation(ActorError):
    """Raised when an actor computes on a device whose lease it does not hold."""


class DeviceMemoryExceeded(ActorError):
    """Raised when what an actor keeps on a device is more than its lease allows."""


class GuardTripped(ActorError):
    """Raised when a guard of the job finds that going on would waste a night; says which and why."""


class BadCheckpoint(ActorError):
    """Raised when a checkpoint cannot be read or does not fit the model."""


class CheckpointNotWritten(ActorError):
    """Raised when a trainer's state could not be written to disk, by this rank or another one."""
