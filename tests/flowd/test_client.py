"""The client against a real socket: answers, refusals, deadlines, a flowd that goes away."""

import os
import time
from collections.abc import Iterator

import pytest
from fake_daemon import FakeDaemon, Server

from flowd import lockfile
from flowd.client import ControlClient
from flowd.errors import DaemonLost, FlowdError, NoDaemon, RequestError
from flowd.paths import StatePaths


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(tmp_path / "state", FakeDaemon())
    yield server
    server.close()


def test_a_request_gets_its_data(server):
    """From the command's daemon half."""
    with ControlClient(server.paths) as client:
        assert client.pid == os.getpid()
        assert client.request("nodes", {})["nodes"][0]["name"] == "here"


def test_refusals_are_raised_by_kind(server):
    """Exit code 2 is a RequestError, 1 is not."""
    with ControlClient(server.paths) as client:
        with pytest.raises(RequestError, match='no job "nope"'):
            client.request("status", {"job": "nope"})
        with pytest.raises(FlowdError) as raised:
            client.request("scale", {})
        assert raised.value.exit_code == 1


def test_without_a_daemon_the_answer_comes_at_once(tmp_path):
    """Also on a state directory whose flowd was killed and left its socket behind."""
    paths = StatePaths(tmp_path)
    start = time.monotonic()
    with pytest.raises(NoDaemon, match=rf"{tmp_path}.*`flowd up --detach`") as raised:
        ControlClient(paths)
    assert raised.value.exit_code == 2
    held = lockfile.acquire(paths.lock)
    held.announce(paths.control_address)
    held.release()
    with pytest.raises(NoDaemon):
        ControlClient(paths)
    assert time.monotonic() - start < 1.0


def test_a_silent_daemon_meets_the_deadline(server):
    """The sentence says that it may still be at work."""
    server.silent = True
    with (
        ControlClient(server.paths) as client,
        pytest.raises(DaemonLost, match=r"within 0\.2 s") as raised,
    ):
        client.request("nodes", {}, timeout_s=0.2)
    assert raised.value.exit_code == 1


def test_a_daemon_that_dies_is_noticed(server):
    """Long before the deadline, by its lock."""
    server.silent = True
    with ControlClient(server.paths) as client:
        server.lock.release()
        start = time.monotonic()
        with pytest.raises(DaemonLost, match="went away"):
            client.request("nodes", {}, timeout_s=60)
        assert time.monotonic() - start < 5


def test_following_yields_updates_until_the_end(server):
    """And None when asked to be woken in between."""
    server.daemon.updates = [
        {"event": "step", "metrics": {"step": 2}},
        {"event": "job", "state": "done", "error": None},
    ]
    with ControlClient(server.paths) as client:
        updates = list(client.follow("status", {"job": "toy", "follow": True}))
    assert [update["event"] for update in updates if update] == ["status", "step", "job", "status"]


def test_following_can_be_woken_while_nothing_happens(server):
    """With idle_s."""
    server.silent = True
    with ControlClient(server.paths) as client:
        updates = client.follow("status", {"job": "toy"}, idle_s=0.01)
        assert next(updates) is None
        assert next(updates) is None
        updates.close()


def test_a_late_reply_is_not_taken_for_another(server):
    """Replies are matched by id."""
    server.daemon.hold.clear()
    arguments = {"job": "toy", "stage": "rollout", "change": "+1", "from_stage": None}
    with ControlClient(server.paths) as client:
        with pytest.raises(DaemonLost):
            client.request("scale", arguments, timeout_s=0.1)
        server.daemon.hold.set()
        assert "nodes" in client.request("nodes", {})
