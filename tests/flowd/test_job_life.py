"""A job among fake processes: what an end, a restart and a scale do to each other when they meet."""

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from channels.inline import InlineHub
from channels.lifecycle import (
    ActorSpec,
    Failed,
    FirstOutput,
    HandedOver,
    HandOver,
    Hello,
    JobEvent,
    Ready,
    Stop,
)
from channels.messages import Message
from flowd import supervisor
from flowd.actor_record import ActorRecord, Process
from flowd.devices import inventory
from flowd.errors import FlowdError
from flowd.job import parse_job
from flowd.jobs import Job
from flowd.leases import LeaseTable
from flowd.leasing import LeaseShell
from flowd.paths import JobPlaces
from flowd.planner import Plan, plan
from flowd.processes import SpawnError

CONFIG = parse_job(
    '[job]\nname = "toy"\nsteps = 9\n[env]\ntask = "arithmetic"\n[model]\nhidden_size = 32\n', "toy"
)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def guarded() -> None:
        async with asyncio.timeout(20.0):
            await main()

    asyncio.run(guarded())


class Actor:
    """A process that says hello and ready, and leaves when it is told to stop."""

    def __init__(self, node: "Node", spec: ActorSpec) -> None:
        self.pid = 1000 + len(node.started)
        self.exited: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.spec = spec
        self.told: list[Message] = []
        self._endpoint = node.hub.endpoint(spec.peer)
        self._endpoint.on_message = self._on_message
        self._endpoint.connect("flowd", spec.flowd_address)
        who: dict[str, Any] = {"actor": spec.actor, "job": spec.job, "epoch": spec.epoch}
        hello = Hello(
            **who,
            pid=self.pid,
            address=self._endpoint.address,
            ready=False,
            holding=False,
            lease_epoch=0,
        )
        self._endpoint.send("flowd", hello)
        self._endpoint.send("flowd", Ready(**who))
        if node.delivers:
            self._endpoint.send("flowd", FirstOutput(**who))

    def kill(self) -> None:
        self._exit("killed")

    def crash(self, error: str) -> None:
        """Raise while at work."""
        who: dict[str, Any] = {
            "actor": self.spec.actor,
            "job": self.spec.job,
            "epoch": self.spec.epoch,
        }
        failed = Failed(**who, error=error, traceback=f"Traceback of {error}", during_setup=False)
        self._endpoint.send("flowd", failed)
        asyncio.get_running_loop().call_soon(self._exit, "exited with code 1")

    def hands_over(self) -> None:
        """Say, as a conductor, that the trainer has committed."""
        self._endpoint.send("flowd", HandedOver(job=self.spec.job, replica="trainer-0"))

    def commits(self, step: int) -> None:
        """Say, as a conductor, that a step was committed."""
        event = JobEvent(job=self.spec.job, kind="commit", data={"step": step})
        self._endpoint.send("flowd", event)

    def _exit(self, how: str) -> None:
        if not self.exited.done():
            self._endpoint.close()
            self.exited.set_result(how)

    def _on_message(self, sender: str, message: Message, payload: Any) -> None:
        self.told.append(message)
        if isinstance(message, Stop):
            self._exit("stopped")


class Node:
    """What a job needs around it. gate: spawns wait for it."""

    def __init__(self, run_dir: Path) -> None:
        self.hub = InlineHub()
        self.started: list[Actor] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.waiting = asyncio.Event()  # a spawn waits at the gate
        self.refused: set[str] = set()  # actors that cannot be started
        self.delivers = False  # actors have something to deliver at once
        self.endpoint = self.hub.endpoint("flowd")
        self.endpoint.on_message = self._receive
        self.devices = inventory("cpu:8@1GiB")
        self.leases = LeaseShell(LeaseTable({d.id: d.memory_bytes for d in self.devices}))
        self.run_dir = run_dir
        self.job = self.make_job(plan(CONFIG, self.devices))

    def make_job(self, made: Plan) -> Job:
        return Job(
            "toy",
            CONFIG,
            made,
            self.devices,
            endpoint=self.endpoint,
            leases=self.leases,
            spawn=self._spawn,
            places=JobPlaces(
                run_dir=self.run_dir,
                socket_dir=self.run_dir,
                weights_dir=self.run_dir / "weights",
                cache_dir=self.run_dir / "cache",
            ),
            node="here",
            incarnation="first",
            emit=lambda kind, data: None,
            on_end=lambda job: None,
        )

    async def _spawn(self, spec: ActorSpec, python: str | None) -> Process:
        if spec.actor in self.refused:
            raise SpawnError("out of processes")
        if not self.gate.is_set():
            self.waiting.set()
            await self.gate.wait()
        actor = Actor(self, spec)
        self.started.append(actor)
        return actor

    def _receive(self, sender: str, message: Message, payload: Any) -> None:
        self.job.receive(sender.rpartition("/")[2], message)

    async def until(self, reached: Callable[[], bool]) -> None:
        """Let the loop turn; everything in it is a message or a task of this process."""
        for _ in range(10_000):
            if reached():
                return
            await asyncio.sleep(0)
        raise AssertionError(f"never reached; alive: {self.alive()}")

    async def all_ready(self) -> None:
        await asyncio.gather(*(r.ready_event.wait() for r in self.job.actors.values()))

    def newest(self, actor: str) -> Actor:
        """The process of the actor's last start."""
        return [a for a in self.started if a.spec.actor == actor][-1]

    def alive(self) -> list[str]:
        return sorted(actor.spec.actor for actor in self.started if not actor.exited.done())

    def leases_held(self) -> list[str]:
        return sorted(lease.replica for lease in self.leases.table)

    def idle(self) -> list[Any]:
        used = self.job.plan.devices()
        return [device for device in self.devices if device.id not in used]


async def scaled(node: Node, stage: str, change: str) -> dict[str, Any]:
    """Scale a job whose trainer commits when it is asked to."""
    scaling = asyncio.create_task(node.job.scale(stage, change, node.idle(), None))
    conductor = node.newest("conductor")
    if stage == "trainer":
        await node.until(lambda: any(isinstance(m, HandOver) for m in conductor.told))
        conductor.hands_over()
    return await scaling


def test_a_job_that_is_ended_while_it_starts_leaves_nothing(tmp_path: Path) -> None:
    """The first fork server imports torch for seconds, and a user changes their mind."""

    async def main() -> None:
        node = Node(tmp_path)
        node.gate.clear()
        starting = asyncio.create_task(node.job.start())
        await node.waiting.wait()
        await node.job.end("cancelled", "cancelled by the user")
        node.gate.set()
        with pytest.raises(FlowdError, match="ended while it was being started: cancelled by"):
            await starting
        assert node.started
        assert node.alive() == node.leases_held() == []
        assert node.job.state == "cancelled"

    run(main)


def test_a_job_that_ends_while_it_is_scaled_leaves_nothing(tmp_path: Path) -> None:
    """What the scale was about to start has no job any more."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        node.gate.clear()
        scaling = asyncio.create_task(node.job.scale("rollout", "+2", node.idle(), None))
        await node.waiting.wait()
        await node.job.end("done", "all steps were trained")
        node.gate.set()
        with pytest.raises(FlowdError, match="ended while it was being scaled: all steps"):
            await scaling
        assert node.alive() == node.leases_held() == []

    run(main)


def test_slow_crashes_end_the_job_unless_it_commits_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five restarts of a replica without a new commit are forgiven; then its own traceback is the error."""
    monkeypatch.setattr(supervisor, "RESTART_WINDOW_S", 1e-9)  # so slow that no two fall together

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        restarts = itertools.count(1)

        async def crash_and_come_back() -> None:
            record = node.job.actors["rollout-1"]
            node.newest("rollout-1").crash("ValueError: no such token")
            expected = next(restarts)
            await node.until(lambda: record.restarts == expected and record.state == "ready")

        for _ in range(5):
            await crash_and_come_back()
        node.newest("conductor").commits(step=4)
        for _ in range(5):
            await crash_and_come_back()
        node.newest("conductor").commits(step=4)  # played again after a rollback: nothing is gained
        node.newest("rollout-1").crash("ValueError: no such token")
        await node.job.ended.wait()
        assert node.job.state == "failed"
        assert node.job.reason == (
            "rollout-1 raised ValueError: no such token; "
            "it was restarted 5 times without a new commit already, the limit"
        )
        assert node.job.error == "Traceback of ValueError: no such token"
        assert node.alive() == node.leases_held() == []

    run(main)


def test_an_actor_that_is_restarted_can_be_scaled_away(tmp_path: Path) -> None:
    """The restart comes to its end first: the new process is stopped as well."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        node.gate.clear()
        next(a for a in node.started if a.spec.actor == "rollout-1").kill()
        await node.waiting.wait()
        scaling = asyncio.create_task(node.job.scale("rollout", "-1", node.idle(), None))
        await asyncio.sleep(0)
        node.gate.set()
        done = await scaling
        assert done["stopped"] == ["rollout-1"]
        assert [a.spec.actor for a in node.started].count("rollout-1") == 2
        assert "rollout-1" not in node.alive()
        assert "toy/rollout-1" not in node.leases_held()
        await node.job.end("cancelled", "over")
        assert node.alive() == []

    run(main)


def test_a_scale_that_cannot_start_an_actor_changes_nothing(tmp_path: Path) -> None:
    """The caller is told; what was started with it is gone, and so are the leases."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        before, alive, leases = node.job.plan.replicas, node.alive(), node.leases_held()
        node.refused = {"rollout-3"}
        with pytest.raises(FlowdError) as raised:
            await node.job.scale("rollout", "+2", node.idle(), None)
        assert str(raised.value) == (
            'scale rollout=+2: out of processes; job "toy" goes on as before'
        )
        assert node.job.plan.replicas == before
        assert node.alive() == sorted(node.job.actors) == alive
        assert node.leases_held() == leases
        assert node.job.state == "running"
        node.delivers = True
        done = await scaled(node, "rollout", "+1")
        assert done["started"] == ["rollout-4"], "names are never used twice"
        await node.job.end("cancelled", "over")

    run(main)


def test_what_made_way_for_a_scale_that_failed_returns(tmp_path: Path) -> None:
    """The trainer had left, its successor cannot be started: the job goes on with the old one."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        before, alive, leases = node.job.plan.replicas, node.alive(), node.leases_held()
        node.refused = {"trainer-1.1"}
        with pytest.raises(FlowdError, match="goes on as before"):
            await scaled(node, "trainer", "+1")
        assert [a.spec.epoch for a in node.started if a.spec.actor == "trainer-0"] == [0, 1]
        assert node.job.plan.replicas == before
        assert node.alive() == sorted(node.job.actors) == alive
        assert node.leases_held() == leases
        await node.all_ready()
        await node.job.end("cancelled", "over")

    run(main)


def test_a_job_whose_trainer_cannot_return_fails(tmp_path: Path) -> None:
    """Without a trainer nothing goes on; the reason says how that came."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        node.refused = {"trainer-0", "trainer-1"}
        with pytest.raises(FlowdError, match='job "toy" fails, as trainer-0 cannot return'):
            await scaled(node, "trainer", "+1")
        await node.job.ended.wait()
        assert node.job.state == "failed"
        assert "trainer-0 made way for a scale that failed" in node.job.reason
        assert node.alive() == node.leases_held() == []

    run(main)


def test_the_loss_of_the_conductor_hands_the_trainer_over(tmp_path: Path) -> None:
    """It was asked and will never answer: all actors go back to the last commit anyway."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.all_ready()
        (conductor,) = [a for a in node.started if a.spec.kind == "conductor"]
        scaling = asyncio.create_task(node.job.scale("trainer", "+1", node.idle(), None))
        await node.until(lambda: any(isinstance(m, HandOver) for m in conductor.told))
        conductor.kill()
        await node.until(lambda: "trainer-1.1" in node.alive())
        assert "trainer-0" not in node.alive()
        await node.job.end("cancelled", "over")
        with pytest.raises(FlowdError, match="ended while it was being scaled"):
            await scaling
        assert node.alive() == node.leases_held() == []

    run(main)


def test_a_scale_that_a_killed_flowd_had_begun_goes_on(tmp_path: Path) -> None:
    """The saved plan says what was to be; actors beyond it leave, those that miss are started."""

    async def main() -> None:
        node = Node(tmp_path)
        whole = node.job.plan
        await node.job.start()
        await node.all_ready()
        gone, kept = [r for r in whole.replicas if r.stage == "rollout"]
        new = replace(kept, id="rollout-2", index=2)
        others = [r for r in whole.replicas if r.stage != "rollout"]
        node.job.detach()
        before = node.job
        node.job = node.make_job(replace(whole, replicas=(*others, gone, new)))
        for old in before.actors.values():
            fresh = ActorRecord(
                old.name, old.kind, old.replica, old.rank, old.num_ranks, old.devices
            )
            fresh.address = old.address
            assert old.process is not None
            node.job.adopt(fresh, old.process)
        node.job.settle()
        assert node.job.state == "running"
        node.job._ready(node.job.actors["conductor"])
        await node.until(lambda: "rollout-2" in node.alive())
        assert kept.id not in node.alive()
        assert f"toy/{kept.id}" not in node.leases_held()
        assert "toy/rollout-2" in node.leases_held()
        await node.job.end("cancelled", "over")
        assert node.alive() == []

    run(main)


def test_a_resumed_job_forgets_where_ranks_met(tmp_path: Path) -> None:
    """Epochs count anew: a trainer of several ranks would find the addresses of ranks long dead."""

    async def main() -> None:
        node = Node(tmp_path)
        await node.job.start()
        await node.job.end("cancelled", "over")

    left = tmp_path / ".rendezvous-trainer-0.0"
    left.write_bytes(b"old")
    run(main)
    assert not left.exists()
