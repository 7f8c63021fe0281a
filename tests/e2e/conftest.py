"""flowds for tests of whole jobs; whatever a test does to one, nothing of it may be left."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flowd_process import HERE, Flowd

# A shell starts what it puts in the background with SIGINT ignored, and children inherit that: without this, Ctrl-C
# would reach no command of ours wherever pytest itself was started like that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder runs whole jobs."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@contextmanager
def state_directory() -> Iterator[Flowd]:
    """A short path: sockets have to fit."""
    root = Path(tempfile.mkdtemp(prefix="flowd-e2e-"))
    flowd = Flowd(root)
    try:
        yield flowd
        flowd.close()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_flowd() -> Iterator[Flowd]:
    """One state directory for the session."""
    with state_directory() as shared:
        yield shared


@pytest.fixture
def flowd(shared_flowd: Flowd) -> Flowd:
    """A flowd with 12 virtual devices that tests share: each has its own jobs, and ends them.

    A test may stop or kill it: the next one finds it up.
    """
    if not shared_flowd.is_up():
        shared_flowd.up()
    return shared_flowd


@pytest.fixture
def own_flowd() -> Iterator[Flowd]:
    """A state directory of the test's own; the test starts flowd there."""
    with state_directory() as own:
        yield own


@pytest.fixture
def own_flowds() -> Iterator[tuple[Flowd, Flowd]]:
    """Two of them: two nodes on one host."""
    with state_directory() as one, state_directory() as other:
        yield one, other
