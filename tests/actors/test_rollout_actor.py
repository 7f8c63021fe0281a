"""The rollout actor with a tiny model, driven by an env and a conductor that the tests play."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from actor_stage import TINY, Peer, Stage, job_config

from actors.backends.contract import GenerationRequest
from actors.backends.lora import merge
from actors.episodes import Action, SampleRequest, Sampling, TurnRequest
from actors.job_config import JobConfig
from actors.models.config import LoraConfig
from actors.models.loading import build_model
from actors.rollout import text_sampler
from channels.channel import Producer
from channels.errors import Withdrawn
from channels.inline import InlineHub
from channels.lifecycle import Failed, FirstOutput, LeaseIdle, LeaseWanted, Ready
from channels.weights import WeightsDirectory, WeightsPublished
from sim.contract import ChatMessage, TextObservation

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

torch.set_num_threads(1)
NO_TOKENS = np.zeros(0, dtype=np.int32)


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token per turn of the loop, so that things can happen in mid-generation."""
    monkeypatch.setattr(text_sampler, "ADVANCE_S", -1.0)


def question(text: str) -> TextObservation:
    return TextObservation(messages=(ChatMessage(role="user", content=text),))


def request(group: int = 0, *, size: int = 2, **given: Any) -> TurnRequest:
    """The first turn of a group."""
    whole: dict[str, Any] = {
        "group": group,
        "attempt": 0,
        "run_attempt": 0,
        "turn": 0,
        "version": 0,
        "exact": True,
        "samples": tuple(
            SampleRequest(sample=i, history=NO_TOKENS, observation=question(f"{group}+{i}="))
            for i in range(size)
        ),
    }
    return TurnRequest(**{**whole, **given})


def weights_of(version: int, run_attempt: int = 0) -> Any:
    """The weights of a version: those of another seed each."""
    return build_model(TINY, seed=1000 * run_attempt + version)[0]


class Driver:
    """A rollout actor with an env actor and a conductor that the test moves."""

    def __init__(
        self,
        run_dir: Path,
        config: JobConfig,
        *,
        name: str = "rollout-0",
        endless: bool = False,
        **given: Any,
    ) -> None:
        self.stage = Stage(run_dir, "rollout", config, actor=name, devices=("cpu:0",), **given)
        self.directory = WeightsDirectory(run_dir / "weights", keep=4)
        self.endless = endless
        self.steps = 0
        self.resumed: list[int] = []  # tokens that came with requests to the engine
        self.conductor: Peer
        self.env: Peer
        self.requests: Producer

    async def __aenter__(self) -> "Driver":
        await self.stage.__aenter__()
        await self.stage.heard(Ready)
        if self.endless:
            self.stage.actor.sampler.policy._stop_tokens = ()
        self._spy()
        self.conductor = await self.stage.meet("conductor", "conductor")
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.stage.__aexit__(*error)

    def _spy(self) -> None:
        actor = self.stage.actor
        advance, prepare = actor._advance, actor.sampler._prepare

        def counting(admissible: Any) -> None:
            self.steps += 1
            advance(admissible)

        def recording(work: Any) -> None:
            prepare(work)
            requests: list[GenerationRequest | None] = work.state.requests
            self.resumed += [len(r.sampled) for r in requests if r is not None]

        actor._advance, actor.sampler._prepare = counting, recording

    async def with_env(self) -> "Driver":
        self.env = await self.stage.meet("env-0", "env")
        self.requests = self.env.router.producer("requests", bound=16)
        self.requests.add_consumer(self.stage.spec.peer)
        return self

    def publish(self, version: int, run_attempt: int = 0, *, on_disk: bool = True) -> None:
        """A version can be loaded, and the conductor says so."""
        published = WeightsPublished(
            run_attempt=run_attempt, policy_version=version, path="", size_bytes=0
        )
        if on_disk:
            tensors = weights_of(version, run_attempt).named_parameters()
            published = self.directory.publish(
                run_attempt, version, [(name, t.detach()) for name, t in tensors]
            )
        self.conductor.endpoint.send(self.stage.spec.peer, published)

    async def advanced(self, steps: int) -> None:
        """Wait for so many more turns of generation."""
        until = self.steps + steps
        await self.stage.until(lambda: self.steps >= until)

    def in_flight(self) -> int:
        return self.requests.statistics().in_flight


def logprobs_of(model: Any, action: Action, history: Any = NO_TOKENS) -> Any:
    """Teacher-forced log-probs of an action's tokens."""
    context = np.concatenate([history, action.prompt, action.tokens])
    with torch.no_grad():
        logits = model(torch.tensor(context[None].astype(np.int64))).logits[0]
    first = len(history) + len(action.prompt)
    rows = torch.log_softmax(logits[first - 1 : -1].float(), dim=-1)
    return rows[torch.arange(len(action.tokens)), torch.tensor(action.tokens.astype(np.int64))]


def same(one: list[Action | None], other: list[Action | None]) -> bool:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a is not None
        assert b is not None
        if a.tokens.tolist() != b.tokens.tolist() or a.text != b.text:
            return False
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    return True


def test_a_turn_is_answered_with_its_actions(run: Run, tmp_path: Path) -> None:
    """Prompt, tokens, log-probs of the policy, versions, mask and text fit together, in the order asked."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.publish(0)
            actions: list[Action] = await driver.requests.call(request(3))
            policy = driver.stage.actor.sampler.policy
            for i, action in enumerate(actions):
                expected = policy.encode(NO_TOKENS, question(f"3+{i}="))
                np.testing.assert_array_equal(action.prompt, expected)
                assert 1 <= len(action.tokens) <= 6
                assert action.finish == ("length" if len(action.tokens) == 6 else "stop")
                assert action.versions.tolist() == [0] * len(action.tokens)
                assert action.mask.all()
                assert action.mask.shape == action.tokens.shape
                assert action.text == policy.decode(action.tokens)
                expected_logprobs = logprobs_of(weights_of(0), action)
                np.testing.assert_allclose(action.logprobs, expected_logprobs, atol=1e-4)
            assert actions[0].tokens.tolist() != actions[1].tokens.tolist()
            await driver.stage.heard(FirstOutput)
            assert driver.in_flight() == 0

    run(main)


def test_a_burst_of_requests_starts_together(run: Run, tmp_path: Path) -> None:
    """Requests that come one after another to an idle actor share their decode steps."""

    async def main() -> None:
        config = job_config(rollout={"max_running": 8, "max_new_tokens": 6})
        async with Driver(tmp_path, config, endless=True) as driver:
            await driver.with_env()
            driver.publish(0)
            await driver.requests.call(request(0))  # the engine is there, and idle
            engine = driver.stage.actor.sampler.engine
            step, rows = engine.step, []

            def counting() -> Any:
                rows.append(engine.num_running)
                return step()

            engine.step = counting
            calls = []
            for group in range(1, 4):
                calls.append(asyncio.create_task(driver.requests.call(request(group))))
                await asyncio.sleep(0)  # a turn of the loop between two of them
            samples = [len(actions) for actions in await asyncio.gather(*calls)]
            assert rows == [sum(samples)] * 6

    run(main)


def test_an_exact_version_is_used_also_when_it_is_not_the_newest(run: Run, tmp_path: Path) -> None:
    """A group that began with version 0 ends with it; others go on with version 1."""

    async def main() -> None:
        async with Driver(tmp_path, job_config(job={"max_staleness": 1})) as driver:
            await driver.with_env()
            driver.publish(0)
            driver.publish(1)
            newer, older = await asyncio.gather(
                driver.requests.call(request(1, version=1)),
                driver.requests.call(request(0, version=0)),
            )
            assert {v for a in older for v in a.versions.tolist()} == {0}
            assert {v for a in newer for v in a.versions.tolist()} == {1}
            for version, actions in ((0, older), (1, newer)):
                expected = logprobs_of(weights_of(version), actions[0])
                np.testing.assert_allclose(actions[0].logprobs, expected, atol=1e-4)
            again = await driver.requests.call(request(0, version=0))
            assert same(again, older), "going back to an older version gives what it gave"

    run(main)


def test_a_delta_is_applied_and_one_that_does_not_fit_is_replaced(run: Run, tmp_path: Path) -> None:
    """Version 1 comes as a delta; for version 2 the actor's weights are not what they should be, and it loads all."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.directory = WeightsDirectory(tmp_path / "weights", keep=4, variant="delta")
            model = weights_of(0)

            async def sample(version: int) -> tuple[str, Action]:
                state = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
                published = driver.directory.publish(0, version, state)
                driver.conductor.endpoint.send(driver.stage.spec.peer, published)
                actions = await driver.requests.call(request(version, version=version))
                np.testing.assert_allclose(
                    actions[0].logprobs, logprobs_of(model, actions[0]), atol=1e-4
                )
                return published.variant, actions[0]

            assert (await sample(0))[0] == "full"
            actor, loaded = driver.stage.actor, []
            load = actor.sampler.engine.load_weights

            def spy(version: int, weights: Any) -> None:
                loaded.append(type(weights).__name__)
                load(version, weights)

            actor.sampler.engine.load_weights = spy
            with torch.no_grad():
                model.get_input_embeddings().weight[10:20] += 0.5
            assert (await sample(1))[0] == "delta"
            assert loaded == ["WeightsDelta"]
            with torch.no_grad():
                model.get_input_embeddings().weight[10:20] -= 0.5
                next(actor.sampler._model.parameters())[30] += (
                    0.5  # a row that the delta does not name
                )
            assert (await sample(2))[0] == "delta"
            assert loaded == ["WeightsDelta", "WeightsDelta", "dict"]
            assert actor.loaded == (0, 2)

    run(main)


def test_adapters_go_on_top_of_a_base_that_is_loaded_once(run: Run, tmp_path: Path) -> None:
    """One that comes late gets the base and the newest adapter; older versions and the base itself can be had again."""
    base = dict(weights_of(0).named_parameters())
    generator = torch.Generator().manual_seed(1)
    layer = "model.layers.0.self_attn.q_proj"
    adapters = {
        version: {
            f"{layer}.lora_A": torch.randn(2, 16, generator=generator),
            f"{layer}.lora_B": torch.randn(16, 2, generator=generator),
        }
        for version in (1, 2)
    }
    lora = LoraConfig(rank=2, alpha=3)
    config = job_config(model=msgspec.structs.replace(TINY, lora=lora), job={"max_staleness": 1})

    def model_of(version: int) -> Any:
        model = weights_of(0)
        merged = dict(merge(base, adapters.get(version, {}), lora.scale))
        model.load_state_dict(merged, strict=False)
        return model

    async def sample(driver: Driver, group: int, version: int) -> None:
        (action, _) = await driver.requests.call(request(group, version=version))
        assert set(action.versions.tolist()) == {version}
        expected = logprobs_of(model_of(version), action)
        np.testing.assert_allclose(action.logprobs, expected, atol=1e-4)

    async def main() -> None:
        loaded: list[int] = []
        async with Driver(tmp_path, config) as driver:
            await driver.with_env()
            driver.publish(0)
            await sample(driver, 0, 0)
            engine = driver.stage.actor.sampler.engine
            load = engine.load_weights
            engine.load_weights = lambda version, weights: (
                loaded.append(version),
                load(version, weights),
            )
            for version in (1, 2):
                published = driver.directory.publish(
                    0, version, adapters[version].items(), base=(0, 0)
                )
                driver.conductor.endpoint.send(driver.stage.spec.peer, published)
                await sample(driver, version, version)
            await sample(driver, 3, 1)
            assert loaded == []
            await sample(driver, 4, 0)
            assert loaded == [0]
        async with Driver(tmp_path, config, name="rollout-1") as late:
            await late.with_env()
            newest = late.directory.newest()
            assert newest is not None
            assert newest.variant == "adapter"
            late.conductor.endpoint.send(late.stage.spec.peer, newest)
            await sample(late, 5, 2)

    run(main)


def test_a_least_version_is_waited_for(run: Run, tmp_path: Path) -> None:
    """Nothing older samples it; the newest does."""

    async def main() -> None:
        async with Driver(tmp_path, job_config(rollout={"adopt": "turn"})) as driver:
            await driver.with_env()
            driver.publish(0)
            early = await driver.requests.call(request(0, exact=False))
            assert early[0].versions[0] == 0
            waiting = asyncio.create_task(driver.requests.call(request(1, version=2, exact=False)))
            driver.publish(1)
            other = await driver.requests.call(request(2, version=0, exact=False))
            assert other[0].versions[0] == 1
            assert not waiting.done()
            driver.publish(2)
            assert (await waiting)[0].versions[0] == 2

    run(main)


@pytest.mark.usefixtures("stepwise")
def test_weights_are_adopted_in_mid_generation(run: Run, tmp_path: Path) -> None:
    """adopt = "token": tokens carry both versions; those after the change are the new policy's on the old prefix."""

    async def main() -> None:
        config = job_config(
            job={"max_staleness": 1}, rollout={"adopt": "token", "max_new_tokens": 20}
        )
        async with Driver(tmp_path, config, endless=True) as driver:
            await driver.with_env()
            driver.publish(0)
            call = asyncio.create_task(driver.requests.call(request(exact=False)))
            await driver.advanced(6)
            driver.publish(1)
            for action in await call:
                versions = action.versions.tolist()
                assert len(versions) == 20
                assert versions == sorted(versions)
                change = versions.index(1)
                assert 3 <= change <= 9
                old = logprobs_of(weights_of(0), action).numpy()
                new = logprobs_of(weights_of(1), action).numpy()
                np.testing.assert_allclose(action.logprobs[:change], old[:change], atol=1e-4)
                np.testing.assert_allclose(action.logprobs[change:], new[change:], atol=1e-4)

    run(main)


@pytest.mark.usefixtures("stepwise")
def test_a_started_group_keeps_its_weights(run: Run, tmp_path: Path) -> None:
    """adopt = "group": new weights wait until what runs has ended."""

    async def main() -> None:
        config = job_config(job={"max_staleness": 1}, rollout={"max_new_tokens": 20})
        async with Driver(tmp_path, config, endless=True) as driver:
            await driver.with_env()
            driver.publish(0)
            call = asyncio.create_task(driver.requests.call(request()))
            await driver.advanced(5)
            driver.publish(1)
            later = asyncio.create_task(driver.requests.call(request(1, version=1)))
            assert {v for a in await call for v in a.versions.tolist()} == {0}
            assert {v for a in await later for v in a.versions.tolist()} == {1}

    run(main)


def test_a_request_that_waits_can_be_withdrawn(run: Run, tmp_path: Path) -> None:
    """Its place is free at once, though no weights and no other request ever come."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.publish(0)
            waiting = asyncio.create_task(driver.requests.call(request(version=9)))
            await driver.stage.until(lambda: len(driver.stage.actor.pending) == 1)
            assert driver.in_flight() == 1
            assert driver.requests.cancel(lambda pending: True) == 1
            with pytest.raises(Withdrawn):
                await waiting
            await driver.stage.until(lambda: driver.in_flight() == 0)
            assert driver.stage.actor.pending == []

    run(main)


@pytest.mark.usefixtures("stepwise")
def test_a_request_that_runs_can_be_withdrawn(run: Run, tmp_path: Path) -> None:
    """Its sequences stop; another request that runs beside it is not touched."""

    async def main() -> None:
        async with Driver(
            tmp_path, job_config(rollout={"max_new_tokens": 40}), endless=True
        ) as driver:
            await driver.with_env()
            driver.publish(0)
            alone = await driver.requests.call(request(1))
            doomed = asyncio.create_task(driver.requests.call(request(0)))
            beside = asyncio.create_task(driver.requests.call(request(1)))
            await driver.advanced(5)
            assert driver.stage.actor.sampler.engine.num_running == 4
            doomed.cancel()
            await driver.stage.until(lambda: driver.stage.actor.sampler.engine.num_running == 2)
            assert len(driver.stage.actor.sampler.by_request) == 2
            assert same(await beside, alone)
            assert driver.in_flight() == 0

    run(main)


def test_requests_of_a_dead_env_are_forgotten(run: Run, tmp_path: Path) -> None:
    """Running and waiting ones alike."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.publish(0)
            calls = [
                asyncio.create_task(driver.requests.call(request(group, version=9)))
                for group in range(2)
            ]
            await driver.stage.until(lambda: len(driver.stage.actor.pending) == 2)
            driver.stage.lose("env-0")
            await driver.stage.until(lambda: driver.stage.actor.pending == [])
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    run(main)


@pytest.mark.usefixtures("stepwise")
def test_what_one_began_another_continues(run: Run, tmp_path: Path) -> None:
    """Asked to leave, it hands back with the tokens it has; the result is that of an undisturbed run."""

    async def main() -> None:
        config = job_config(rollout={"max_new_tokens": 24, "max_running": 4})
        hub = InlineHub()
        async with Driver(tmp_path, config, endless=True, hub=hub) as first:
            await first.with_env()
            first.publish(0)
            undisturbed = await first.requests.call(request(5))
            call = asyncio.create_task(first.requests.call(request(5)))
            waits = asyncio.create_task(first.requests.call(request(6, version=3)))
            await first.advanced(8)
            async with Driver(tmp_path, config, endless=True, hub=hub, name="rollout-1") as second:
                second.publish(0)
                await second.stage.introduce(first.env)
                first.requests.add_consumer(second.stage.spec.peer)
                assert await first.stage.stop() == 0
                actions = await call
                assert same(actions, undisturbed)
                taken_over = second.resumed[:2]
                assert 4 <= min(taken_over) <= max(taken_over) < 24, "with the tokens it had"
                second.publish(3)
                again = await waits
                assert {v for a in again for v in a.versions.tolist()} == {3}

    run(main)


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("offload", [False, True])
def test_parks_in_mid_generation_and_goes_on(run: Run, tmp_path: Path, offload: bool) -> None:
    """The device is given up with the tokens kept on the host, and the result is that of an undisturbed run."""

    async def main() -> None:
        config = job_config(rollout={"max_new_tokens": 24})
        async with Driver(tmp_path, config, endless=True, shared=True) as driver:
            await driver.with_env()
            driver.publish(0)
            undisturbed = await driver.requests.call(request(5))
            await driver.stage.heard(LeaseIdle)
            call = asyncio.create_task(driver.requests.call(request(5)))
            await driver.advanced(8)
            driver.stage.granting = False
            released = await driver.stage.revoke(offload=offload)
            assert released.memory_bytes >= 0
            assert not driver.stage.host.lease.held
            steps = driver.steps
            wanted = len(driver.stage.of(LeaseWanted))
            await driver.stage.heard(LeaseWanted, max(wanted, 2))
            for _ in range(20):
                await asyncio.sleep(0)
            assert driver.steps == steps, "nothing is computed without the lease"
            driver.stage.grant()
            assert same(await call, undisturbed)

    run(main)


def test_parked_it_serves_what_came_meanwhile(run: Run, tmp_path: Path) -> None:
    """Requests and weights that arrive while parked are used after the grant; cancelled ones are not."""

    async def main() -> None:
        config = job_config(job={"max_staleness": 1}, rollout={"adopt": "turn"})
        async with Driver(tmp_path, config, shared=True) as driver:
            await driver.with_env()
            driver.publish(0)
            await driver.requests.call(request(0, exact=False))
            await driver.stage.heard(LeaseIdle)
            driver.stage.granting = False
            await driver.stage.revoke(offload=True)
            doomed = asyncio.create_task(driver.requests.call(request(1, exact=False)))
            call = asyncio.create_task(driver.requests.call(request(2, exact=False)))
            await driver.stage.heard(LeaseWanted, 2)
            driver.publish(1)
            doomed.cancel()
            await driver.stage.until(lambda: driver.stage.actor.newest.policy_version == 1)
            prepared = len(driver.resumed)
            driver.stage.grant()
            assert {v for a in await call for v in a.versions.tolist()} == {1}
            assert len(driver.resumed) == prepared + 2, "the cancelled one was never begun"

    run(main)


def test_a_full_context_gives_none(run: Run, tmp_path: Path) -> None:
    """A later turn that finds no room ends its episode; the others of the group go on."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.publish(0)
            (first,) = await driver.requests.call(request(size=1))
            short = np.concatenate([first.prompt, first.tokens])
            full = np.resize(short, 60)
            samples = tuple(
                SampleRequest(sample=i, history=history, observation=question("more?"))
                for i, history in enumerate((full, short, full))
            )
            later = request(turn=1, samples=samples)
            actions = await driver.requests.call(later)
            assert actions[0] is None
            assert actions[2] is None
            assert actions[1] is not None
            assert len(actions[1].tokens) >= 1
            expected = logprobs_of(weights_of(0), actions[1], short)
            np.testing.assert_allclose(actions[1].logprobs, expected, atol=1e-4)

    run(main)


def test_a_first_prompt_without_room_is_an_error(run: Run, tmp_path: Path) -> None:
    """No setting of the run can play this task: it says which group, how long, and what to raise."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.publish(0)
            one, two = request(7).samples
            long = request(7, samples=(one, replace(two, observation=question("9" * 70))))
            call = asyncio.create_task(driver.requests.call(long))
            assert driver.stage.life is not None
            assert await driver.stage.life == 1
            (failed,) = driver.stage.of(Failed)
            assert failed.error.startswith("ValueError: group 7: its prompt has 73 tokens")
            assert "rollout.max_context_tokens = 64: raise it" in failed.error
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(main)


def test_deterministic_groups_do_not_depend_on_their_company(run: Run, tmp_path: Path) -> None:
    """Alone, beside others, in any order: tokens and log-probs are equal to the last bit."""

    async def main() -> None:
        config = job_config(
            job={"deterministic": True}, rollout={"group_size": 3, "max_running": 9}
        )
        async with Driver(tmp_path, config) as driver:
            await driver.with_env()
            driver.publish(0)
            alone = {
                group: await driver.requests.call(request(group, size=3)) for group in range(4)
            }
            for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
                together = await asyncio.gather(
                    *(driver.requests.call(request(group, size=3)) for group in order)
                )
                for group, actions in zip(order, together, strict=True):
                    for a, b in zip(actions, alone[group], strict=True):
                        assert a.tokens.tolist() == b.tokens.tolist()
                        assert a.logprobs.tobytes() == b.logprobs.tobytes()

    run(main)


@pytest.mark.usefixtures("stepwise")
def test_a_deterministic_group_that_is_parked_starts_over(run: Run, tmp_path: Path) -> None:
    """Its batch is part of its result, so it is run again whole, with the same bits."""

    async def main() -> None:
        config = job_config(job={"deterministic": True}, rollout={"max_new_tokens": 16})
        async with Driver(tmp_path, config, endless=True, shared=True) as driver:
            await driver.with_env()
            driver.publish(0)
            undisturbed = await driver.requests.call(request(5))
            call = asyncio.create_task(driver.requests.call(request(5)))
            await driver.advanced(6)
            await driver.stage.revoke(offload=True)
            for a, b in zip(await call, undisturbed, strict=True):
                assert a.tokens.tolist() == b.tokens.tolist()
                assert a.logprobs.tobytes() == b.logprobs.tobytes()

    run(main)


def test_versions_that_are_gone_do_not_end_the_actor(run: Run, tmp_path: Path) -> None:
    """Whoever asks for one is past withdrawing it; everything else goes on."""

    async def main() -> None:
        async with Driver(tmp_path, job_config(job={"max_staleness": 1})) as driver:
            await driver.with_env()
            driver.publish(1)
            late = asyncio.create_task(driver.requests.call(request(0, version=0)))
            (first, _) = await driver.requests.call(request(1, version=1))
            assert first.versions[0] == 1
            await driver.stage.until(lambda: driver.stage.actor.gone == {(0, 0)})
            late.cancel()
            await driver.stage.until(lambda: driver.in_flight() == 0)
            driver.publish(2, on_disk=False)
            driver.publish(3)
            (third, _) = await driver.requests.call(request(2, version=3))
            assert third.versions[0] == 3

    run(main)


def test_a_rolled_back_run_is_not_mixed_with_the_next(run: Run, tmp_path: Path) -> None:
    """Version 0 of run attempt 1 has other weights than that of attempt 0; each request gets its own."""

    async def main() -> None:
        async with Driver(tmp_path, job_config()) as driver:
            await driver.with_env()
            driver.publish(0)
            before = await driver.requests.call(request(0))
            driver.publish(0, run_attempt=1)
            stale = asyncio.create_task(driver.requests.call(request(1)))
            after = await driver.requests.call(request(0, run_attempt=1))
            expected = logprobs_of(weights_of(0, run_attempt=1), after[0])
            np.testing.assert_allclose(after[0].logprobs, expected, atol=1e-4)
            assert abs(logprobs_of(weights_of(0), after[0]) - expected).max() > 1e-3
            assert not stale.done()
            stale.cancel()
            await driver.stage.until(lambda: driver.in_flight() == 0)
            assert len(before) == 2

    run(main)


def test_more_memory_than_the_lease_allows_is_an_error(run: Run, tmp_path: Path) -> None:
    """The actor says how much it holds and how much it may."""

    async def main() -> None:
        async with Driver(tmp_path, job_config(), device_memory_bytes=2**10) as driver:
            await driver.with_env()
            driver.publish(0)
            call = asyncio.create_task(driver.requests.call(request()))
            assert driver.stage.life is not None
            assert await driver.stage.life == 1
            assert "DeviceMemoryExceeded" in driver.stage.of(Failed)[0].error
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(main)


def test_a_request_may_bring_its_own_sampling_and_key(run: Run, tmp_path: Path) -> None:
    """An evaluation's: greedy whatever the job samples with; the same draws under any group's number."""

    async def main() -> None:
        async with Driver(
            tmp_path, job_config(rollout={"temperature": 2.0}), endless=True
        ) as driver:
            await driver.with_env()
            driver.publish(0)
            samples = tuple(
                SampleRequest(sample=i, history=NO_TOKENS, observation=question("1+1="))
                for i in range(2)
            )

            async def ask(group: int, **given: Any) -> list[Action]:
                actions: list[Action] = await driver.requests.call(
                    request(group, samples=samples, **given)
                )
                return actions

            greedy = await ask(0, sampling=Sampling(temperature=0.0), key=7)
            assert greedy[0].tokens.tolist() == greedy[1].tokens.tolist()
            assert greedy[0].sampling.temperature == 0.0
            first, again = await ask(1, key=7), await ask(2, key=7)
            assert same(first, again)
            assert first[0].tokens.tolist() != first[1].tokens.tolist()
            assert not same(first, await ask(1))
            assert not same(first, await ask(1, key=8))

    run(main)


@pytest.mark.usefixtures("stepwise")
def test_an_evaluation_gets_its_version_and_keeps_it(run: Run, tmp_path: Path) -> None:
    """Where weights change in mid-generation and groups never end: it waits for those that run, and goes before
    those that come; its own tokens are all of its version.
    """

    async def main() -> None:
        config = job_config(
            job={"max_staleness": 1}, rollout={"adopt": "token", "max_new_tokens": 12}
        )
        async with Driver(tmp_path, config, endless=True) as driver:
            await driver.with_env()
            driver.publish(0)
            driver.publish(1)
            calls = [asyncio.create_task(driver.requests.call(request(0, exact=False)))]
            await driver.advanced(2)
            exact = asyncio.create_task(driver.requests.call(request(9, version=0), priority=1))
            await driver.advanced(1)
            calls += [
                asyncio.create_task(driver.requests.call(request(group, exact=False)))
                for group in (1, 2)
            ]
            await driver.advanced(14)  # the first has ended, the evaluation runs
            driver.publish(2)
            actions = await exact
            assert {v for action in actions for v in action.versions.tolist()} == {0}
            expected = logprobs_of(weights_of(0), actions[0])
            np.testing.assert_allclose(actions[0].logprobs, expected, atol=1e-4)
            first, *_ = await asyncio.gather(*calls)  # what waited comes to its end too
            assert {v for action in first for v in action.versions.tolist()} == {1}

    run(main)


def test_without_a_trainer_it_samples_with_the_model_as_it_is(run: Run, tmp_path: Path) -> None:
    """A job of no steps: nothing is in the node's copy of the weights, and nothing is waited for."""

    async def main() -> None:
        async with Driver(tmp_path, job_config(job={"steps": 0})) as driver:
            await driver.with_env()
            driver.publish(0, on_disk=False)
            actions = await driver.requests.call(request())
            assert {v for action in actions for v in action.versions.tolist()} == {0}
            expected = logprobs_of(weights_of(0), actions[0])
            np.testing.assert_allclose(actions[0].logprobs, expected, atol=1e-4)

    run(main)
