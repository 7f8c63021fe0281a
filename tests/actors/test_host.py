"""What surrounds an actor: who is heard when, what flowd is told, and with which code it ends."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from actor_stage import JOB, Peer, Stage, job_config

from actors import registry
from actors.actor import Actor
from actors.host import EXIT_DONE, EXIT_ORPHANED, EXIT_RAISED, MAX_UNMET, ActorHost
from channels.lifecycle import (
    ActorSpec,
    Failed,
    Forget,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Introduce,
    JobEvent,
    LeaseGranted,
    LeaseReleased,
    LeaseRevoked,
    LeaseWanted,
    Ready,
    Stop,
    Welcome,
)
from channels.messages import Message
from channels.work import AskCall, InCall, StageTimes

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Puppet(Actor):
    """Does what a test tells it; records what it hears."""

    async def setup(self) -> None:
        self.log_of_calls: list[Any] = []
        self.may_end = asyncio.Event()
        await self.before_ready()

    async def before_ready(self) -> None: ...

    async def run(self) -> None:
        await self.may_end.wait()

    async def leave(self) -> None:
        self.log_of_calls.append("leave")

    def on_peer(self, peer: Introduce) -> None:
        self.log_of_calls.append(("peer", peer.peer, peer.epoch))

    def on_peer_lost(self, peer: Introduce) -> None:
        self.log_of_calls.append(("lost", peer.peer, peer.epoch))

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        self.log_of_calls.append((sender, message))


class FailsInSetup(Puppet):
    async def before_ready(self) -> None:
        raise ValueError("no such task")


class FailsInGroup(Puppet):
    async def run(self) -> None:
        async def group(number: int) -> None:
            raise RuntimeError(f"group {number} broke")

        async with asyncio.TaskGroup() as tasks:
            async with asyncio.TaskGroup() as inner:
                inner.create_task(group(1))
                inner.create_task(group(2))
            tasks.create_task(group(3))


class FailsInLeave(Puppet):
    async def leave(self) -> None:
        raise OSError("disk full")


class FailsToListen(Puppet):
    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        raise LookupError("no such group")


class SlowSetup(Puppet):
    async def before_ready(self) -> None:
        await asyncio.Event().wait()


class NeverLeaves(Puppet):
    async def leave(self) -> None:
        await asyncio.Event().wait()


class FailsToPark(Puppet):
    async def park(self, offload: bool) -> int:
        raise MemoryError("host memory is full")


class HearsEarly(Puppet):
    """Records in a list that exists before `setup`."""

    heard: ClassVar[list[Message]] = []

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        self.heard.append(message)


class FailsInReport(Puppet):
    def report(self) -> dict[str, Any]:
        raise KeyError("policy_version")


@pytest.fixture(autouse=True)
def puppets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class above is a kind."""
    for cls in (Puppet, *Puppet.__subclasses__()):
        monkeypatch.setitem(registry.ACTORS, cls.__name__, f"test_host:{cls.__name__}")


def stage(tmp_path: Path, kind: str = "Puppet", **given: Any) -> Stage:
    return Stage(tmp_path, kind, job_config(), actor="puppet-0", **given)


def test_says_hello_then_ready_and_ends_when_told(run: Run, tmp_path: Path) -> None:
    """Stop: `run` is cancelled, `leave` called once, exit code 0."""

    async def main() -> None:
        async with stage(tmp_path) as own:
            await own.heard(Ready)
            (hello,) = own.of(Hello)
            assert (hello.actor, hello.epoch, hello.ready) == ("puppet-0", 0, False)
            assert hello.address == own.endpoint.address
            assert await own.stop() == EXIT_DONE
            assert own.actor.log_of_calls == ["leave"]
            assert not own.of(Failed)

    run(main)


def test_ends_when_run_returns(run: Run, tmp_path: Path) -> None:
    """Exit code 0, after handing back."""

    async def main() -> None:
        async with stage(tmp_path) as own:
            await own.heard(Ready)
            own.actor.may_end.set()
            assert await own.life == EXIT_DONE
            assert own.actor.log_of_calls == ["leave"]

    run(main)


def test_peer_that_speaks_before_it_was_introduced(run: Run, tmp_path: Path) -> None:
    """Its messages wait, in order, for the introduction: the other side may have been told first."""

    async def main() -> None:
        async with stage(tmp_path) as own:
            await own.heard(Ready)
            early = Peer(own, f"{JOB}/env-0", "env", 0, 0)
            early.endpoint.connect(own.spec.peer, own.endpoint.address)
            messages = [StageTimes(seconds={"work": float(i)}) for i in range(3)]
            for message in messages:
                early.endpoint.send(own.spec.peer, message)
            met = await own.meet("rollout-0", "rollout")
            assert own.actor.log_of_calls == [("peer", met.name, 0)]
            own.tell(early.introduction)
            await own.until(lambda: len(own.actor.log_of_calls) == 5)
            assert own.actor.log_of_calls[1:] == [
                ("peer", early.name, 0),
                *((early.name, message) for message in messages),
            ]
            early.endpoint.close()

    run(main)


def test_messages_of_a_peer_that_was_forgotten_are_dropped(run: Run, tmp_path: Path) -> None:
    """What a dead actor said without having been met is not taken for its successor's."""

    async def main() -> None:
        async with stage(tmp_path) as own:
            await own.heard(Ready)
            early = Peer(own, f"{JOB}/env-0", "env", 0, 0)
            early.endpoint.connect(own.spec.peer, own.endpoint.address)
            early.endpoint.send(own.spec.peer, StageTimes(seconds={}))
            early.endpoint.send(own.spec.peer, StageTimes(seconds={}))
            await own.meet("rollout-0", "rollout")
            own.tell(Forget(peer=early.name, kind="env", epoch=0))
            early.endpoint.close()
            again = await own.meet("env-0", "env", epoch=1)
            assert own.actor.log_of_calls[1:] == [("peer", again.name, 1)]

    run(main)


def test_strangers_do_not_fill_the_memory(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who is not introduced while many others speak is given up first; who spoke last is not."""

    async def main() -> None:
        async with stage(tmp_path) as own:
            await own.heard(Ready)
            strangers = [Peer(own, f"{JOB}/env-{i}", "env", 0, 0) for i in range(4)]
            for stranger in strangers:
                stranger.endpoint.connect(own.spec.peer, own.endpoint.address)
                for number in range(MAX_UNMET // 3):
                    message = StageTimes(seconds={"work": float(number)})
                    stranger.endpoint.send(own.spec.peer, message)
            for stranger in strangers:
                own.tell(stranger.introduction)
            await own.until(lambda: strangers[-1].name in own.actor.peers)
            heard = Counter(entry[0] for entry in own.actor.log_of_calls if entry[0] != "peer")
            expected = {stranger.name: MAX_UNMET // 3 for stranger in strangers[1:]}
            assert heard == expected
            assert f"unmet_dropped sender={strangers[0].name}" in caplog.text
            for stranger in strangers:
                stranger.endpoint.close()

    run(main)


def test_a_newer_epoch_replaces_a_peer_and_a_late_farewell_is_ignored(
    run: Run, tmp_path: Path
) -> None:
    """The farewell of the epoch before does not lose the peer of now."""

    async def main() -> None:
        async with stage(tmp_path) as own:
            old = await own.meet("env-0", "env", epoch=3)
            old.endpoint.close()
            new = await own.meet("env-0", "env", epoch=4)
            await own.until(lambda: len(own.actor.log_of_calls) == 3)
            own.tell(Forget(peer=old.name, kind="env", epoch=3))
            own.tell(old.introduction)
            new.endpoint.send(own.spec.peer, StageTimes(seconds={}))
            await own.until(lambda: len(own.actor.log_of_calls) == 4)
            assert own.actor.log_of_calls == [
                ("peer", old.name, 3),
                ("lost", old.name, 3),
                ("peer", new.name, 4),
                (new.name, StageTimes(seconds={})),
            ]

    run(main)


def test_messages_before_the_actor_exists_reach_it(run: Run, tmp_path: Path) -> None:
    """flowd may speak as soon as it heard hello, before the actor's class is loaded."""

    async def main() -> None:
        HearsEarly.heard.clear()
        own = stage(tmp_path, "HearsEarly", devices=("cpu:0",))
        own.flowd.connect(own.spec.peer, own.endpoint.address)
        own.tell(Welcome(incarnation="one", heartbeat_s=1.0))
        own.tell(LeaseGranted(lease_epoch=5, shared=False))
        own.tell(JobEvent(job=JOB, kind="note", data={}))
        for _ in range(3):
            await asyncio.sleep(0)
        assert own.host.actor is None
        assert own.host.lease.held
        async with own:
            await own.heard(Ready)
            assert HearsEarly.heard == [JobEvent(job=JOB, kind="note", data={})]

    run(main)


def test_failure_during_setup_says_so(run: Run, tmp_path: Path) -> None:
    """flowd does not restart what cannot start: the error, the traceback, and when."""

    async def main() -> None:
        async with stage(tmp_path, "FailsInSetup") as own:
            assert await own.life == EXIT_RAISED
            (failed,) = own.of(Failed)
            assert failed.during_setup
            assert failed.error == "ValueError: no such task"
            assert failed.traceback.startswith("Traceback (most recent call last)")
            assert "before_ready" in failed.traceback
            assert not own.of(Ready)

    run(main)


def test_failure_of_many_tasks_is_told_as_the_first_one(run: Run, tmp_path: Path) -> None:
    """Of nested groups of errors the user sees the first leaf, as it was raised."""

    async def main() -> None:
        async with stage(tmp_path, "FailsInGroup") as own:
            assert await own.life == EXIT_RAISED
            (failed,) = own.of(Failed)
            assert failed.error == "RuntimeError: group 1 broke"
            assert "ExceptionGroup" not in failed.traceback
            assert not failed.during_setup

    run(main)


def test_failure_to_hand_back_is_reported(run: Run, tmp_path: Path) -> None:
    """An actor that could not leave in order says why, and its exit code shows it."""

    async def main() -> None:
        async with stage(tmp_path, "FailsInLeave") as own:
            await own.heard(Ready)
            assert await own.stop() == EXIT_RAISED
            assert own.of(Failed)[0].error == "OSError: disk full"

    run(main)


def test_failure_to_park_ends_the_actor(run: Run, tmp_path: Path) -> None:
    """Also while it only waits: flowd hears the traceback, not only that a deadline was missed."""

    async def main() -> None:
        async with stage(tmp_path, "FailsToPark", devices=("cpu:0",)) as own:
            await own.heard(Ready)
            own.grant()
            own.tell(LeaseRevoked(lease_epoch=1, offload=True, deadline_s=1.0))
            assert await own.life == EXIT_RAISED
            assert own.of(Failed)[0].error == "MemoryError: host memory is full"
            assert not own.of(LeaseReleased)

    run(main)


def test_failure_in_a_handler_ends_the_actor(run: Run, tmp_path: Path) -> None:
    """What it should have learned is lost: going on would be waiting for it."""

    async def main() -> None:
        async with stage(tmp_path, "FailsToListen") as own:
            await own.heard(Ready)
            own.tell(JobEvent(job=JOB, kind="note", data={}))
            own.tell(JobEvent(job=JOB, kind="note", data={}))
            assert await own.life == EXIT_RAISED
            (failed,) = own.of(Failed)
            assert failed.error == "LookupError: no such group"

    run(main)


def test_stopped_during_setup_has_nothing_to_hand_back(run: Run, tmp_path: Path) -> None:
    """`leave` may rely on what `setup` made, so it is not called before."""

    async def main() -> None:
        async with stage(tmp_path, "SlowSetup") as own:
            await own.heard(Hello)
            await own.until(lambda: own.host.actor is not None)
            await own.until(lambda: hasattr(own.actor, "may_end"))
            assert await own.stop() == EXIT_DONE
            assert own.actor.log_of_calls == []

    run(main)


@pytest.mark.parametrize("kind", ["conductor", "env", "rollout", "trainer"])
def test_every_kind_can_be_stopped_before_it_is_ready(run: Run, tmp_path: Path, kind: str) -> None:
    """A job that is cancelled right after its start ends without an error."""

    async def main() -> None:
        devices = ("cpu:0",) if kind in ("rollout", "trainer") else ()
        own = Stage(tmp_path, kind, job_config(metrics={"tensorboard": False}), devices=devices)
        own.granting = False
        async with own:
            await own.heard(Hello)
            assert await own.stop() == EXIT_DONE
            assert not own.of(Failed)

    run(main)


def test_leaving_ends_at_its_deadline(run: Run, tmp_path: Path) -> None:
    """Handing back that takes too long is given up: flowd would kill the process a moment later."""

    async def main() -> None:
        async with stage(tmp_path, "NeverLeaves") as own:
            await own.heard(Ready)
            own.tell(Stop(reason="test", deadline_s=0.01))
            assert own.life is not None
            assert await own.life == EXIT_DONE

    run(main)


def test_a_new_flowd_gets_hello_and_wishes_again(run: Run, tmp_path: Path) -> None:
    """The first Welcome is answered by nothing; a new incarnation hears where the actor stands."""

    async def main() -> None:
        own = stage(tmp_path, devices=("cpu:0",))
        own.granting = False
        async with own:
            await own.heard(Ready)
            waiting = asyncio.create_task(own.host.lease.__aenter__())
            await own.heard(LeaseWanted)
            own.tell(Welcome(incarnation="one", heartbeat_s=1.0))
            own.tell(Welcome(incarnation="one", heartbeat_s=1.0))
            own.tell(Welcome(incarnation="two", heartbeat_s=1.0))
            hello = await own.heard(Hello, 2)
            assert hello.ready
            assert not hello.holding
            await own.heard(LeaseWanted, 2)
            assert len(own.of(Hello)) == 2
            own.grant()
            await waiting

    run(main)


def process_like(own: Stage) -> ActorHost:
    """The host as it is in a process of its own: with heartbeats and a worker thread."""
    host = ActorHost(own.spec, own.endpoint, inline=False)
    host._heartbeat_s = 0.005
    return host


def test_orphan_leaves_after_the_grace(run: Run, tmp_path: Path) -> None:
    """As long as flowd answers it lives; unanswered for the grace it hands back and ends with 3."""

    async def main() -> None:
        own = stage(tmp_path, orphan_grace_s=0.15)
        own.host = process_like(own)
        beats = 0
        loop = asyncio.get_running_loop()
        answered_last = 0.0

        def answer(sender: str, message: Message, payload: Any) -> None:
            nonlocal beats, answered_last
            beats += isinstance(message, Heartbeat)
            if isinstance(message, Heartbeat) and beats <= 40:
                answered_last = loop.time()
                own.tell(HeartbeatReply(incarnation="one"))

        own.flowd.on_message = answer
        async with own:
            began = loop.time()
            assert own.life is not None
            assert await own.life == EXIT_ORPHANED
            assert beats > 40
            assert loop.time() - answered_last >= 0.15
            assert answered_last - began >= 0.15, "it lived on answers for longer than the grace"
            assert own.actor.log_of_calls == ["leave"]

    run(main)


def test_failing_heartbeat_is_no_orphan(run: Run, tmp_path: Path) -> None:
    """Its own error is what the user sees."""

    async def main() -> None:
        own = stage(tmp_path, "FailsInReport")
        own.host = process_like(own)
        async with own:
            assert own.life is not None
            assert await own.life == EXIT_RAISED
            assert own.of(Failed)[0].error == "KeyError: 'policy_version'"

    run(main)


def test_blocking_work_keeps_the_loop_free(run: Run, tmp_path: Path) -> None:
    """Heartbeats go on while the worker thread computes, one call at a time."""

    async def main() -> None:
        own = stage(tmp_path)
        own.host = process_like(own)
        async with own:
            await own.heard(Ready)
            beats = len(own.of(Heartbeat))
            end = threading.Event()
            order: list[str] = []

            def long() -> None:
                end.wait(20.0)
                order.append("long")

            first = asyncio.create_task(own.actor.blocking(long))
            second = asyncio.create_task(own.actor.blocking(order.append, "second"))
            await own.heard(Heartbeat, beats + 3)
            assert order == []
            end.set()
            await asyncio.gather(first, second)
            assert order == ["long", "second"]

    run(main)


class Simulator:
    """Hangs until it is let go."""

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()

    def step(self) -> None:
        self.entered.set()
        self.go_on.wait(20.0)


def test_an_actor_says_where_it_hangs(run: Run, tmp_path: Path) -> None:
    """Its loop answers while the worker thread is stuck: the call, its line, and for how long."""

    async def main() -> None:
        own = stage(tmp_path)
        own.host = process_like(own)
        async with own:
            asker = await own.meet("conductor", "conductor")
            asker.endpoint.send(own.spec.peer, AskCall())
            assert await asker.take(InCall) == InCall(call="", seconds=0.0)
            simulator = Simulator()
            stuck = asyncio.create_task(own.actor.blocking(simulator.step))
            await asyncio.to_thread(simulator.entered.wait, 20.0)
            asker.endpoint.send(own.spec.peer, AskCall())
            first = await asker.take(InCall, 2)
            assert first.call.startswith("Simulator.step at ")
            assert "threading.py:" in first.call, "the innermost line of Python"
            asker.endpoint.send(own.spec.peer, AskCall())
            assert (await asker.take(InCall, 3)).seconds > first.seconds > 0
            simulator.go_on.set()
            await stuck
            asker.endpoint.send(own.spec.peer, AskCall())
            assert (await asker.take(InCall, 4)).call == ""
            assert own.actor.log_of_calls == [("peer", asker.name, 0)], "the kind has no part in it"

    run(main)


def test_torch_that_is_loaded_late_has_the_threads_of_the_plan(tmp_path: Path) -> None:
    """An actor that starts cold, in a shell that says otherwise: `python = …` of a stage."""
    (tmp_path / "late_kind.py").write_text(
        textwrap.dedent(
            """
            import sys
            from actors.actor import Actor

            class Late(Actor):
                async def setup(self):
                    assert "torch" not in sys.modules
                    import torch
                    print(f"threads={torch.get_num_threads()}")

                async def run(self):
                    return
            """
        )
    )
    spec = ActorSpec(
        actor="late-0",
        job=JOB,
        kind="late",
        epoch=0,
        replica="late-0",
        rank=0,
        num_ranks=1,
        devices=(),
        replica_devices=(),
        device_memory_bytes=None,
        config=msgspec.msgpack.encode(job_config()),
        run_dir=str(tmp_path),
        address=f"ipc://{tmp_path}/late.sock",
        weights_dir=str(tmp_path),
        cache_dir=str(tmp_path),
        flowd_address=f"ipc://{tmp_path}/flowd.sock",
        orphan_grace_s=30.0,
        threads=1,
    )
    (tmp_path / "spec").write_bytes(msgspec.msgpack.encode(spec))
    entry = (
        "import pathlib, sys; from actors import main, registry; "
        "registry.ACTORS['late'] = 'late_kind:Late'; "
        "sys.exit(main.run(pathlib.Path('spec').read_bytes()))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    environment |= {"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "5"}
    ended = subprocess.run(
        [sys.executable, "-c", entry],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (EXIT_DONE, "threads=1\n"), ended.stderr
