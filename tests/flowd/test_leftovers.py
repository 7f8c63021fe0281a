"""What a killed flowd left is removed once, and never from under another one."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowd import leftovers, lockfile
from flowd.paths import StatePaths


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[StatePaths]:
    """A state directory as a killed flowd leaves it."""
    paths = StatePaths(tmp_path)
    lockfile.acquire(paths.lock).release()
    (paths.weights / "toy").mkdir(parents=True)
    (paths.weights / "toy" / "weights-0-7.safetensors").write_bytes(b"w" * 4096)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(paths.sockets / "flowd.sock"))
    yield paths
    leftovers.clear(paths)


def test_weights_and_sockets_go_and_the_state_stays(paths: StatePaths) -> None:
    """The database, the runs and the lock file are for the next flowd."""
    before = sorted(os.listdir(paths.weights.parent))
    assert leftovers.clear(paths)
    assert not paths.weights.exists()
    assert sorted(os.listdir(paths.weights.parent)) == [
        n for n in before if n != paths.weights.name
    ]
    assert os.listdir(paths.root) == ["flowd.lock"]
    assert leftovers.clear(paths), "nothing to remove is no error"


def test_what_a_running_flowd_uses_is_left_alone(paths: StatePaths) -> None:
    """It was started while the orphans of the one before were being ended."""
    held = lockfile.acquire(paths.lock)
    try:
        assert not leftovers.clear(paths)
        assert (paths.weights / "toy" / "weights-0-7.safetensors").exists()
        assert (paths.sockets / "flowd.sock").is_socket()
    finally:
        held.release()


def test_a_removed_state_directory_is_no_reason_to_keep_weights(paths: StatePaths) -> None:
    """Shared memory lies elsewhere, and nobody else would free it."""
    (paths.sockets / "flowd.sock").unlink()
    paths.lock.unlink()
    paths.root.rmdir()
    assert leftovers.clear(paths)
    assert not paths.weights.exists()
    assert not paths.root.exists()
