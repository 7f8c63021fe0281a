"""One flowd per state directory: the lock that it holds, which also says where it listens.

The kernel drops the lock with the process, whatever kills it, so the file needs no cleaning up and
a stale one misleads nobody. A child that is forked (not exec'ed) while flowd runs must close the
descriptor, or it would keep the lock of a dead flowd: `HeldLock.fileno` is for that.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flowd.errors import AlreadyRunning, RequestError

# A client's probe holds a shared lock for some microseconds; flowd's start outlasts that.
START_PATIENCE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The running flowd. address: of its control socket; "" while it is still starting."""

    pid: int
    address: str


class HeldLock:
    """The lock of a state directory, held until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def announce(self, address: str) -> None:
        """Say where the control socket is; called once it is bound."""
        text = json.dumps({"pid": os.getpid(), "address": address}).encode()
        # One write that never shrinks the file: a reader sees the old line or the new.
        os.pwrite(self._descriptor, text.ljust(512), 0)

    def release(self) -> None:
        """Give the state directory up. Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def acquire(lock: Path) -> HeldLock:
    """Take the state directory for this process; AlreadyRunning when another flowd has it.

    RequestError when the directory cannot be made or written.
    """
    try:
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(lock, error) from None
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                other = _read(descriptor)
                os.close(descriptor)
                raise AlreadyRunning(
                    f"a flowd (pid {other.pid}) already runs on state directory {lock.parent}: "
                    "one per directory; stop it with `flowd down`, or choose another --state-dir"
                ) from None
            time.sleep(0.01)
        except BaseException:
            os.close(descriptor)
            raise
    held = HeldLock(descriptor)
    held.announce("")
    return held


def holder(lock: Path) -> Holder | None:
    """The flowd that holds the lock, or None when none runs. Never waits."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unusable(lock, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    finally:
        os.close(descriptor)
    return None


@contextlib.contextmanager
def kept_free(lock: Path) -> Iterator[bool]:
    """Whether no flowd runs; then none starts inside the block, which may take milliseconds at most."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # with its whole state directory
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _unusable(lock: Path, error: OSError) -> RequestError:
    return RequestError(
        f"state directory {lock.parent} cannot be used ({error.filename}: {error.strerror}): name a "
        "directory of your own with --state-dir or FLOWD_HOME"
    )


def _read(descriptor: int) -> Holder:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # between the lock and the first line: a flowd in its first millisecond
        content = {}
    return Holder(pid=content.get("pid", 0), address=content.get("address", ""))
