"""Errors of the flowd package, each with the exit code that the command line gives for it."""


class FlowdError(Exception):
    """Raised when something that was asked for failed; the message is what the user reads."""

    exit_code = 1


class RequestError(FlowdError, ValueError):
    """Raised when what the user asked was wrong; nothing was changed."""

    exit_code = 2


class JobFileError(RequestError):
    """Raised when a job file, or an override of it, breaks a rule."""


class NoDaemon(RequestError):
    """Raised when no flowd runs on the state directory."""


class AlreadyRunning(RequestError):
    """Raised when another flowd holds the state directory."""


class UnknownJob(RequestError):
    """Raised when a command names a job that does not exist."""


class JobFailed(FlowdError):
    """Raised when a job ended without reaching its end.

    traceback: the failing actor's own, or "" where it was not an exception that ended the job.
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


class DaemonLost(FlowdError):
    """Raised when flowd went away after it was asked, or did not answer within the deadline."""
