"""Errors that simulators and tasks raise."""


class SimError(Exception):
    """Raised when a simulator or task cannot do what was asked of it."""


class MissingDependency(SimError):
    """Raised when a task needs a package, driver or asset that is not installed."""


class BadTaskData(SimError, ValueError):
    """Raised when a data file does not have the rows that a task needs."""


class WorkerLost(SimError):
    """Raised when a worker process died or hung: the episodes of its slots are lost."""


class SimulatorFailed(SimError):
    """Raised when an environment in a worker raised an error of another kind than ours."""
