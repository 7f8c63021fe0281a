"""The inference actor between an env actor and a trainer that the tests play."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import torch
from actor_stage import TINY, Peer, Stage, job_config

from actors.backends.contract import CRITIC_WEIGHTS
from actors.backends.reference_file import save_reference
from actors.episodes import Action, Group, ReadingRequest, Segment, Turn
from actors.job_config import JobConfig
from actors.models.loading import build_model
from channels.channel import Consumer, Item, Producer
from channels.lifecycle import FirstOutput, LeaseIdle, LeaseWanted
from channels.weights import WeightsDirectory
from channels.work import StageTimes

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

torch.set_num_threads(1)


def inference_config() -> JobConfig:
    return job_config(
        job={"groups_per_step": 4}, algorithm={"kl_coefficient": 0.1}, inference={"devices": 1}
    )


def make_group(index: int) -> Group:
    action = Action(
        prompt=np.array([9, 10], dtype=np.int32),
        tokens=np.array([11, 12 + index], dtype=np.int32),
        logprobs=np.full(2, -4.5, dtype=np.float32),
        versions=np.zeros(2, dtype=np.int32),
        mask=np.ones(2, dtype=np.bool_),
    )
    turn = Turn(observation=None, action=action, reward=1.0)
    return Group(
        group=index,
        attempt=0,
        run_attempt=0,
        seed=index,
        segments=(Segment(sample=0, turns=(turn,)),),
    )


class Play:
    """An inference actor, an env actor's and a trainer's end of its channels."""

    def __init__(self, tmp_path: Path) -> None:
        self.stage = Stage(
            tmp_path, "inference", inference_config(), devices=("cpu:0",), shared=True
        )
        model, _ = build_model(TINY, seed=0, dtype=torch.float32)
        save_reference(tmp_path, dict(model.named_parameters()))
        self.env: Producer
        self.groups: Consumer

    async def __aenter__(self) -> "Play":
        await self.stage.__aenter__()
        peer = await self.stage.meet("env-0", "env")
        self.env = peer.router.producer("groups", bound=8)
        self.env.add_consumer(self.stage.spec.peer)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.stage.__aexit__(*error)

    async def trainer_comes(self, epoch: int = 0) -> Peer:
        peer = await self.stage.meet("trainer-0", "trainer", epoch=epoch)
        self.groups = peer.router.consumer("groups", capacity=8)
        self.groups.add_producer(self.stage.spec.peer)
        return peer


def reference(item: Item) -> list[float]:
    found: list[float] = item.payload.segments[0].turns[0].computed["reference"].tolist()
    return found


def test_groups_pass_and_gain_log_probs(run: Run, tmp_path: Path) -> None:
    """The env actor hears that its group is delivered once the trainer holds it, and not before."""

    async def main() -> None:
        async with Play(tmp_path) as play:
            await play.trainer_comes()
            conductor = await play.stage.meet("conductor", "conductor")
            calls = [asyncio.create_task(play.env.call(make_group(i), priority=-3)) for i in (0, 1)]
            items = [await play.groups.get() for _ in calls]
            assert [item.payload.group for item in items] == [0, 1]
            assert all(item.priority == -3 for item in items)
            assert all(len(reference(item)) == 2 and max(reference(item)) < 0 for item in items)
            assert reference(items[0]) != reference(items[1])
            items[1].ack()
            await calls[1]
            assert not calls[0].done()
            items[0].ack()
            await calls[0]
            await play.stage.heard(FirstOutput)
            await conductor.take(StageTimes)

    run(main)


def test_a_trainer_that_comes_back_is_offered_what_the_dead_one_held(
    run: Run, tmp_path: Path
) -> None:
    """The group stays the env actor's until then."""

    async def main() -> None:
        async with Play(tmp_path) as play:
            await play.trainer_comes()
            call = asyncio.create_task(play.env.call(make_group(5)))
            first = reference(await play.groups.get())
            play.stage.lose("trainer-0")
            await play.trainer_comes(epoch=1)
            item = await play.groups.get()
            assert (item.payload.group, reference(item)) == (5, first)
            item.ack()
            await call

    run(main)


def test_parks_and_comes_back_when_the_next_group_is_there(run: Run, tmp_path: Path) -> None:
    """Idle under a shared lease it gives the device up, offloads, and reads the same afterwards."""

    async def main() -> None:
        async with Play(tmp_path) as play:
            await play.trainer_comes()
            calls = [asyncio.create_task(play.env.call(make_group(2)))]
            item = await play.groups.get()
            item.ack()
            first = reference(item)
            await play.stage.heard(LeaseIdle)
            wanted = len(play.stage.of(LeaseWanted))
            released = await play.stage.revoke(offload=True)
            assert released.memory_bytes == 0
            calls.append(asyncio.create_task(play.env.call(make_group(2))))
            item = await play.groups.get()
            item.ack()
            assert reference(item) == first
            assert len(play.stage.of(LeaseWanted)) == wanted + 1
            await asyncio.gather(*calls)

    run(main)


def test_what_nobody_waits_for_is_not_read(run: Run, tmp_path: Path) -> None:
    """Its env actor took the group back, as when the job is rolled back; the next one is served."""

    async def main() -> None:
        async with Play(tmp_path) as play:
            await play.trainer_comes()
            play.stage.granting = False
            held = asyncio.create_task(play.env.call(make_group(0)))
            await play.stage.heard(LeaseWanted)
            withdrawn = asyncio.create_task(play.env.call(make_group(1)))
            kept = asyncio.create_task(play.env.call(make_group(2)))
            pending = play.stage.actor.pending
            await play.stage.until(lambda: len(pending) == 2)
            withdrawn.cancel()
            await play.stage.until(lambda: any(waiting[-1].cancelled for waiting in pending))
            play.stage.granting = True
            play.stage.grant()
            items = [await play.groups.get() for _ in range(2)]
            assert [item.payload.group for item in items] == [0, 2]
            for item in items:
                item.ack()
            await asyncio.gather(held, kept)

    run(main)


def test_leaving_gives_back_what_waits(run: Run, tmp_path: Path) -> None:
    """Another inference actor reads it."""

    async def main() -> None:
        async with Play(tmp_path) as play:
            call = asyncio.create_task(play.env.call(make_group(4)))
            await play.stage.heard(LeaseWanted)  # and no trainer is there
            await play.stage.until(lambda: play.env.statistics().in_flight == 1)
            assert await play.stage.stop() == 0
            await play.stage.until(lambda: play.env.statistics().in_flight == 0)
            assert play.env.statistics().depth == 1
            assert not call.done()
            call.cancel()

    run(main)


class Asking:
    """An inference actor that reads the policy of a version, and the trainer that asks it."""

    def __init__(self, tmp_path: Path) -> None:
        config = job_config(
            job={"groups_per_step": 4},
            algorithm={"name": "decoupled_ppo", "mini_batches": 2},
            inference={"devices": 1, "computes": ["proximal", "values"]},
        )
        self.stage = Stage(tmp_path, "inference", config, devices=("cpu:0",), shared=True)
        self.policy = WeightsDirectory(tmp_path / "weights", keep=2)
        self.critic = WeightsDirectory(tmp_path / "weights" / CRITIC_WEIGHTS, keep=2)
        self.requests: Producer

    async def __aenter__(self) -> "Asking":
        await self.stage.__aenter__()
        await self.trainer_comes()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.stage.__aexit__(*error)

    async def trainer_comes(self, epoch: int = 0) -> None:
        peer = await self.stage.meet("trainer-0", "trainer", epoch=epoch)
        self.requests = peer.router.producer("readings", bound=8, epoch=epoch)
        self.requests.add_consumer(self.stage.spec.peer)

    def publish(self, run_attempt: int, version: int) -> None:
        """Every version is another model, and its critic says 10 times its version everywhere."""
        model, _ = build_model(TINY, seed=version, dtype=torch.float32)
        critic = {"head.weight": torch.zeros(1, 16), "head.bias": torch.tensor([10.0 * version])}
        self.critic.publish(run_attempt, version, critic.items())
        self.policy.publish(run_attempt, version, model.named_parameters())

    def ask(self, version: int, run_attempt: int = 0) -> "asyncio.Task[Any]":
        request = ReadingRequest(group=make_group(1), run_attempt=run_attempt, version=version)
        return asyncio.create_task(self.requests.call(request))


def test_a_group_is_read_with_the_version_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    """Also an older one, and again after an offload: what is loaded is what the request names."""

    async def main() -> None:
        async with Asking(tmp_path) as play:
            conductor = await play.stage.meet("conductor", "conductor")
            play.publish(0, 1)
            play.publish(0, 2)
            (first,) = await play.ask(1)
            (second,) = await play.ask(2)
            (again,) = await play.ask(1)
            assert (first.version, second.version) == (1, 2)
            assert (first.values.tolist(), first.last_value) == ([10.0, 10.0], 10.0)
            assert (second.values.tolist(), second.last_value) == ([20.0, 20.0], 20.0)
            assert first.proximal.tolist() == again.proximal.tolist()
            assert first.proximal.tolist() != second.proximal.tolist()
            await play.stage.heard(FirstOutput)
            await conductor.take(StageTimes)
            await play.stage.heard(LeaseIdle)
            released = await play.stage.revoke(offload=True)
            assert released.memory_bytes == 0
            (back,) = await play.ask(1)
            assert back.proximal.tolist() == first.proximal.tolist()

    run(main)


def test_the_same_version_of_a_run_that_went_back_is_loaded_anew(run: Run, tmp_path: Path) -> None:
    """Its weights are others: the step was sampled and trained again."""

    async def main() -> None:
        async with Asking(tmp_path) as play:
            play.publish(0, 1)
            (before,) = await play.ask(1)
            other, _ = build_model(TINY, seed=9, dtype=torch.float32)
            critic = {"head.weight": torch.zeros(1, 16), "head.bias": torch.tensor([5.0])}
            play.critic.publish(1, 1, critic.items())
            play.policy.publish(1, 1, other.named_parameters())
            (after,) = await play.ask(1, run_attempt=1)
            assert after.values.tolist() == [5.0, 5.0]
            assert after.proximal.tolist() != before.proximal.tolist()

    run(main)


def test_a_request_for_weights_that_are_gone_waits_to_be_withdrawn(
    run: Run, tmp_path: Path
) -> None:
    """The job is past it: its trainer died. The next one is served, and holds nothing up."""

    async def main() -> None:
        async with Asking(tmp_path) as play:
            void = play.ask(7)
            await play.stage.heard(LeaseIdle)
            assert not void.done()
            play.stage.lose("trainer-0")
            await play.trainer_comes(epoch=1)
            play.publish(1, 3)
            (reading,) = await play.ask(3, run_attempt=1)
            assert reading.version == 3
            assert play.stage.actor.requests.statistics().in_flight == 0
            void.cancel()

    run(main)
