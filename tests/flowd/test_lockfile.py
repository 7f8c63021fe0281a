"""One flowd per state directory."""

import os
import subprocess
import sys

import pytest

from flowd import lockfile
from flowd.errors import AlreadyRunning, RequestError


def test_no_file_and_a_stale_file_mean_that_none_runs(tmp_path):
    """What a dead flowd wrote misleads nobody."""
    lock = tmp_path / "flowd.lock"
    assert lockfile.holder(lock) is None
    held = lockfile.acquire(lock)
    held.announce("ipc:///x")
    held.release()
    held.release()
    assert lock.exists()
    assert lockfile.holder(lock) is None


def test_the_holder_is_known_and_a_second_is_refused(tmp_path):
    """With the pid, the rule and the way out."""
    lock = tmp_path / "state" / "flowd.lock"
    held = lockfile.acquire(lock)
    try:
        assert lockfile.holder(lock) == lockfile.Holder(pid=os.getpid(), address="")
        held.announce("ipc:///a/much/longer/address/of/the/control.sock")
        held.announce("ipc:///short")
        assert lockfile.holder(lock) == lockfile.Holder(pid=os.getpid(), address="ipc:///short")
        with pytest.raises(AlreadyRunning, match=rf"pid {os.getpid()}.*flowd down") as raised:
            lockfile.acquire(lock)
        assert raised.value.exit_code == 2
    finally:
        held.release()
    lockfile.acquire(lock).release()


def test_a_killed_holder_holds_nothing(tmp_path):
    """kill -9 frees the state directory at once."""
    lock = tmp_path / "flowd.lock"
    code = (
        "import sys, pathlib; from flowd import lockfile;"
        "held = lockfile.acquire(pathlib.Path(sys.argv[1])); print('held', flush=True);"
        "sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        running = lockfile.holder(lock)
        assert running is not None
        assert running.pid == child.pid
        child.kill()
        child.wait()
        assert lockfile.holder(lock) is None


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    """A file stands in the way: nobody can run there, and one who asks is told so."""
    (tmp_path / "file").touch()
    lock = tmp_path / "file" / "flowd.lock"
    with pytest.raises(RequestError, match=r"cannot be used \(.*--state-dir"):
        lockfile.acquire(lock)
    assert lockfile.holder(lock) is None
