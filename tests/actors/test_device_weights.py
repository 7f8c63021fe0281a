"""Weights from a trainer's GPU to a rollout actor's, with real actors and GPUs that are host memory."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from actor_stage import JOB, TINY, Stage, job_config
from device_fakes import FakeDevice, FakeNode
from test_rollout_actor import Driver, request
from test_trainer_actor import FakeEngine, Play, RecordingWriter, make_group

from actors import devices
from actors.job_config import JobConfig
from actors.models.loading import build_model
from actors.rollout.actor import NOTHING
from actors.trainer import building
from actors.trainer import device_weights as trainer_side
from channels.inline import InlineHub
from channels.lifecycle import Forget, Ready
from channels.tensors.errors import DeviceError
from channels.weights import WeightsPublished
from channels.weights.device import DeviceReceiver
from channels.weights.device_messages import DeviceWeightsRefused
from channels.work import BeginRun

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Node:
    """The GPUs of the actors, by actor. apart: actors that have none after all"""

    def __init__(self) -> None:
        self.node = FakeNode()
        self.gpus: dict[str, FakeDevice] = {}
        self.apart: set[str] = set()

    def gpu_of(self, spec: Any) -> FakeDevice:
        if spec.actor in self.apart:
            raise DeviceError("no driver")
        return self.gpus.setdefault(spec.actor, FakeDevice(self.node, f"GPU-{spec.actor}"))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """Every actor that computes has a GPU, which the others reach."""
    made = Node()
    monkeypatch.setattr(devices, "on_gpu", lambda spec: bool(spec.devices))
    monkeypatch.setattr(devices, "gpu_of", made.gpu_of)
    return made


class Both:
    """A trainer and a rollout actor that know each other; what the conductor hears is passed on when the test says."""

    def __init__(self, tmp_path: Path, config: JobConfig | None = None, **trainer: Any) -> None:
        hub = InlineHub()
        config = config or job_config(job={"max_staleness": 1})
        self.play = Play(tmp_path, config, hub=hub, **trainer)
        self.driver = Driver(tmp_path, config, hub=hub)
        self.passed = 0
        self._open = AsyncExitStack()

    async def __aenter__(self) -> "Both":
        # Both stages have a conductor and an env of these names: one after the other, and the trainer's stay.
        await self._open.enter_async_context(self.play)
        await self._open.enter_async_context(self.driver)
        await self.driver.with_env()
        await introduce(self.play.stage, self.driver.stage)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._open.__aexit__(*error)

    def pass_on(self, count: int | None = None) -> list[str]:
        """Tell the rollout actor what was published since; returns the variants."""
        published = self.play.conductor.of(WeightsPublished)[self.passed :][:count]
        self.passed += len(published)
        for message in published:
            self.driver.conductor.endpoint.send(self.driver.stage.spec.peer, message)
        return [message.variant for message in published]

    async def train(self, step: int) -> Any:
        groups = [make_group(2 * step), make_group(2 * step + 1)]
        await self.play.deliver(*groups)
        self.play.admit(step, *(group.group for group in groups), last=True)
        return await self.play.step_done(step + 1)

    def weights(self) -> Any:
        return dict(self.driver.stage.actor.sampler.weights_in_place())

    def trained(self) -> Any:
        return dict(self.play.stage.actor.engine.weights())

    @contextmanager
    def without_host_copy(self) -> Iterator[None]:
        """Nothing may be read from there."""
        actor = self.driver.stage.actor
        kept, actor.weights = actor.weights, None
        yield
        actor.weights = kept


async def introduce(*stages: Stage) -> None:
    for stage in stages:
        await stage.heard(Ready)
    for one in stages:
        for other in stages:
            if one is not other:
                one.tell(other.introduction)
    for one in stages:
        for other in stages:
            name = other.spec.peer
            await one.until(lambda o=one, n=name: n == o.spec.peer or n in o.actor.peers)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in right)


def test_versions_go_from_gpu_to_gpu(run: Run, tmp_path: Path, node: Node) -> None:
    """Each is announced before the host copy has it, adopted at the boundary, bit for bit, and named in the metrics."""

    async def main() -> None:
        async with Both(tmp_path) as both:
            await both.play.stage.until(lambda: bool(both.play.stage.actor.on_gpus))
            await both.play.begin()
            await both.play.conductor.take(WeightsPublished, 2)
            for version in range(3):
                with both.without_host_copy():
                    assert both.pass_on(1) == ["cuda_ipc"]
                    actions = await both.driver.requests.call(request(version, version=version))
                assert actions[0].versions.tolist() == [version] * len(actions[0].tokens)
                assert both.pass_on() == ["full"]
                assert same(both.weights(), both.trained())
                before = {name: tensor.clone() for name, tensor in both.weights().items()}
                done = await both.train(version)
                assert done.weights_variant == "cuda_ipc"
                assert done.metrics["weights_bytes"] == sum(
                    t.nbytes for t in both.trained().values()
                )
                assert same(both.weights(), before), "the next one comes at the boundary"
            # A started group goes on with its version, which the host copy has.
            await both.driver.requests.call(request(2, version=2))
            assert both.driver.stage.actor.loaded == (0, 2)
            assert len(node.gpus["rollout-0"].opened) == 1

    run(main)


def test_who_asks_too_late_loads_the_host_copy(run: Run, tmp_path: Path, node: Node) -> None:
    """The trainer's weights are others by then; it says so, and the version is complete on the host."""

    async def main() -> None:
        async with Both(tmp_path) as both:
            await both.play.stage.until(lambda: bool(both.play.stage.actor.on_gpus))
            await both.play.begin()
            await both.play.conductor.take(WeightsPublished, 2)
            first = {name: tensor.clone() for name, tensor in both.trained().items()}
            await both.train(0)
            refused = []
            received = both.driver.stage.actor.device_weights.received

            def listen(sender: str, message: Any) -> None:
                refused.append(isinstance(message, DeviceWeightsRefused))
                received(sender, message)

            both.driver.stage.actor.device_weights.received = listen
            assert both.pass_on(2) == ["cuda_ipc", "full"]
            await both.driver.requests.call(request(0, version=0))
            assert refused == [True]
            assert same(both.weights(), first)
            assert both.pass_on(2) == ["cuda_ipc", "full"]
            await both.driver.requests.call(request(1, version=1))
            assert same(both.weights(), both.trained())
            assert not any(refused[1:])

    run(main)


def test_a_trainer_that_dies_in_between_leaves_no_version(
    run: Run, tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a version is not computed with: the host copy is waited for."""
    take = DeviceReceiver.take

    async def main() -> None:
        async with Both(tmp_path) as both:
            await both.play.stage.until(lambda: bool(both.play.stage.actor.on_gpus))
            await both.play.begin()
            await both.play.conductor.take(WeightsPublished, 2)
            dies = Forget(peer=f"{JOB}/trainer-0", kind="trainer", epoch=0)

            def half(self: Any, bucket: Any) -> bool:
                take(self, bucket)
                both.driver.stage.tell(dies)
                return False

            monkeypatch.setattr(DeviceReceiver, "take", half)
            assert both.pass_on(1) == ["cuda_ipc"]
            call = asyncio.create_task(both.driver.requests.call(request(0)))
            actor = both.driver.stage.actor
            await both.driver.stage.until(lambda: not actor.peers_of("trainer"))
            await both.driver.stage.until(lambda: actor.device_weights._loading is None)
            assert actor.loaded == NOTHING
            assert not call.done()
            both.pass_on()
            await call
            assert actor.loaded == (0, 0)

    run(main)


@pytest.mark.parametrize("apart", ["trainer-0", "rollout-0"])
def test_without_a_way_between_the_gpus_the_host_copy_serves(
    run: Run, tmp_path: Path, node: Node, apart: str
) -> None:
    """Told in the log of the side that has none; the other one goes on."""
    node.apart.add(apart)

    async def main() -> None:
        async with Both(tmp_path) as both:
            await both.play.stage.until(lambda: bool(both.play.stage.actor.on_gpus))
            await both.play.begin()
            count = 1 if apart == "trainer-0" else 2
            await both.play.conductor.take(WeightsPublished, count)
            both.pass_on()
            await both.driver.requests.call(request(0))
            done = await both.train(0)
            assert done.weights_variant == ("full" if apart == "trainer-0" else "cuda_ipc")
            both.pass_on()
            await both.driver.requests.call(request(1, version=1))
            assert same(both.weights(), both.trained())

    run(main)


def test_a_receiver_that_does_not_answer_holds_nobody_up_for_long(
    run: Run, tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next update waits for its deadline, not for it; until it answers, the host copy serves all."""
    monkeypatch.setattr(trainer_side, "TIMEOUT_S", 0.05)

    async def main() -> None:
        async with Both(tmp_path) as both:
            actor = both.driver.stage.actor
            await both.play.stage.until(lambda: bool(both.play.stage.actor.on_gpus))
            await both.play.begin()
            await both.play.conductor.take(WeightsPublished, 2)
            taken = actor.device_weights._taken
            actor.device_weights._taken = lambda sender, message: None
            both.pass_on(1)
            await both.driver.requests.call(request(0))  # it has all of it, and does not say so
            both.pass_on()
            await both.train(0)
            actor.device_weights._taken = taken
            both.pass_on()
            await both.driver.requests.call(request(1, version=1))
            assert same(both.weights(), both.trained())
            assert len(both.play.stage.actor.device_weights._gpu[1].reading()) == 1

    run(main)


class SameOnAllRanks(FakeEngine):
    """The weights of a model, as every rank of a data-parallel trainer has them."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.version = 0

    def weights(self) -> Any:
        model = build_model(TINY, seed=self.version)[0]
        return ((name, tensor.detach()) for name, tensor in model.named_parameters())

    def finish_step(self) -> dict[str, float]:
        self.version += 1
        return super().finish_step()


def test_each_rank_sends_its_share(
    run: Run, tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver puts together what comes from the GPUs of all ranks, each byte once."""
    engines: dict[int, SameOnAllRanks] = {}
    monkeypatch.setattr(
        building,
        "build_engine",
        lambda spec, config: engines.setdefault(spec.rank, SameOnAllRanks(spec.rank)),
    )
    monkeypatch.setattr(building, "build_checkpoint_writer", RecordingWriter)

    async def main() -> None:
        ranks: dict[str, Any] = {"num_ranks": 2, "replica_devices": ("cpu:0", "cpu:1")}
        config = job_config(trainer={"devices": 2})
        async with Both(tmp_path, config, **ranks) as both:
            hub = both.play.stage.hub
            follower = Stage(
                tmp_path, "trainer", config, actor="trainer-0.1", rank=1, hub=hub,
                devices=("cpu:1",), **ranks,
            )  # fmt: skip
            async with follower:
                await introduce(both.play.stage, follower)
                await introduce(follower, both.driver.stage)
                await both.play.stage.until(lambda: bool(both.play.stage.actor.on_gpus))
                both.play.say(BeginRun(run_attempt=0, step=0))
                await both.play.conductor.take(WeightsPublished, 2)
                for version in range(2):
                    assert both.pass_on() == ["cuda_ipc", "full"]
                    with both.without_host_copy():
                        await both.driver.requests.call(request(version, version=version))
                    assert same(both.weights(), dict(engines[0].weights()))
                    await both.train(version)
                assert len(node.gpus["rollout-0"].opened) == 2
                assert all(node.gpus[name].allocated for name in ("trainer-0", "trainer-0.1"))

    run(main)
