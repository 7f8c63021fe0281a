"""The desk inside flowd: each request once, errors as replies, streams that end with their client."""

import asyncio
from typing import Any

import pytest
from fake_daemon import FakeDaemon, job_status

from channels.control import CtlProgress, CtlReply, CtlRequest
from channels.errors import PeerLost
from flowd.control import KEPT_REPLIES, ControlDesk


def ask(command: str, request_id: str = "1", follow: bool = False, **arguments: Any) -> CtlRequest:
    return CtlRequest(request_id=request_id, command=command, arguments=arguments, follow=follow)


async def take(desk: ControlDesk, request: CtlRequest) -> list[CtlReply | CtlProgress]:
    sent: list[CtlReply | CtlProgress] = []

    async def send(message: CtlReply | CtlProgress) -> None:
        sent.append(message)

    async with asyncio.timeout(10):
        await desk.take(request, send)
    return sent


def test_a_repeated_request_is_carried_out_once():
    """By id, while it is in progress and after it; the reply is the first one's."""
    daemon = FakeDaemon()
    daemon.hold.clear()
    request = ask("scale", job="toy", stage="rollout", change="+1", from_stage=None)

    async def scenario() -> None:
        desk = ControlDesk(daemon)
        first = asyncio.create_task(take(desk, request))
        second = asyncio.create_task(take(desk, request))
        assert await asyncio.to_thread(daemon.scaling.wait, 10)
        assert not first.done()
        daemon.hold.set()
        replies = [await first, await second, await take(desk, request)]
        assert replies[0] == replies[1] == replies[2]
        assert isinstance(replies[0][0], CtlReply)
        assert replies[0][0].ok

    asyncio.run(scenario())
    assert len(daemon.asked) == 1


def test_old_replies_are_forgotten():
    """Kept replies are bounded."""

    async def scenario() -> int:
        desk = ControlDesk(FakeDaemon())
        for number in range(KEPT_REPLIES + 10):
            await take(desk, ask("jobs", str(number)))
        return len(desk._done)

    assert asyncio.run(scenario()) == KEPT_REPLIES


@pytest.mark.parametrize(
    ("request_", "exit_code", "part"),
    [
        (ask("status", job="nope"), 2, 'no job "nope"'),
        (ask("teleport"), 2, "different versions"),
        (ask("trace"), 2, "different versions"),
        (ask("jobs", follow=True), 2, "no command 'jobs' to stream"),
        (ask("scale", stage="rollout"), 1, "failed inside flowd: KeyError"),
    ],
)
def test_errors_become_replies(request_, exit_code, part, caplog):
    """A wrong request is 2, a bug of ours is 1 and says where the traceback is."""
    [reply] = asyncio.run(take(ControlDesk(FakeDaemon()), request_))
    assert isinstance(reply, CtlReply)
    assert (reply.ok, reply.exit_code) == (False, exit_code)
    assert reply.error is not None
    assert part in reply.error


def test_a_plan_that_does_not_fit_is_a_wrong_request():
    """The planner's refusal has exit code 2."""
    toml = '[job]\nname = "big"\nsteps = 1\n[env]\ntask = "arithmetic"\n[rollout]\ndevices = 9\n'
    [reply] = asyncio.run(take(ControlDesk(FakeDaemon()), ask("plan", toml=toml, source="x")))
    assert isinstance(reply, CtlReply)
    assert reply.exit_code == 2
    assert reply.error is not None
    assert "10 devices" in reply.error


def test_status_stream_begins_and_ends_with_the_status():
    """Updates in order between the two; the end of the job ends it."""
    daemon = FakeDaemon()
    daemon.updates = [
        {"event": "step", "metrics": {"step": 2}},
        {"event": "job", "state": "done", "error": None},
        {"event": "step", "metrics": {"step": 99}},
    ]
    sent = asyncio.run(take(ControlDesk(daemon), ask("status", follow=True, job="toy")))
    events = [message.data["event"] for message in sent[:-1] if isinstance(message, CtlProgress)]
    assert events == ["status", "step", "job", "status"]
    assert isinstance(sent[-1], CtlReply)
    assert sent[-1].ok


def test_a_client_that_left_ends_its_subscription():
    """Quietly, and the daemon's iterator is closed."""
    closed = []

    class Watching(FakeDaemon):
        def subscribe(self, job):
            async def updates():
                try:
                    while True:
                        yield {"event": "step", "metrics": {"step": 1}}
                finally:
                    closed.append(True)

            return updates()

    async def scenario() -> None:
        count = 0

        async def send(message: CtlReply | CtlProgress) -> None:
            nonlocal count
            count += 1
            if count == 3:
                raise PeerLost("gone")

        async with asyncio.timeout(10):
            await ControlDesk(Watching()).take(ask("status", follow=True, job="toy"), send)

    asyncio.run(scenario())
    assert closed == [True]


def test_an_ended_job_is_told_at_once():
    """Following what is over waits for nothing."""
    daemon = FakeDaemon()
    daemon.statuses["toy"] = job_status(state="failed")
    sent = asyncio.run(take(ControlDesk(daemon), ask("status", follow=True, job="toy")))
    assert len(sent) == 2
