"""Env and rollout actors with a policy that acts on arrays, driven by a conductor and a trainer that the test plays."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from actor_stage import Stage, job_config

from actors.env.arrays import check_fit
from actors.episodes import Group, SampleRequest, Sampling, TurnRequest
from actors.job_config import JobConfig
from actors.models.arrays import stack
from actors.models.config import PolicyConfig
from actors.models.policies import build_policy
from actors.rollout.array_sampler import NO_TOKENS, ArraySampler
from channels.inline import InlineHub
from channels.lifecycle import Ready
from channels.weights import WeightsDirectory
from sim.errors import SimError
from sim.registry import make

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
STEPS = 7
POLICY = {"observation": {"state": [4]}, "action": 2, "chunk": 3, "hidden": [8]}


def config_of(policy: dict[str, Any] = POLICY, **args: Any) -> JobConfig:
    """A job on the point that reaches; chunks do not divide the episode."""
    return job_config(
        policy=policy,
        env={"task": "point_reach", "args": {"max_steps": STEPS, **args}},
        algorithm={"name": "ppo", "gae_level": "turn"},
    )


def publish(run_dir: Path, policy: PolicyConfig, version: int) -> Any:
    """Weights of a version: another seed each."""
    built = build_policy(policy, seed=100 + version)
    built.observed()["state"].add(torch.tensor([4.0, *[1.0] * 4, *[9.0] * 4], dtype=torch.float64))
    directory = WeightsDirectory(run_dir / "weights", keep=4)
    state = built.state_dict()
    return built, directory.publish(0, version, state.items())


async def play(tmp_path: Path, config: JobConfig) -> tuple[Any, Group]:
    """One group of the job, played with version 0."""
    hub = InlineHub()
    env = Stage(tmp_path, "env", config, hub=hub)
    rollout = Stage(tmp_path, "rollout", config, hub=hub, devices=("cpu:0",))
    async with env, rollout:
        for stage in (env, rollout):
            await stage.heard(Ready)
        env.tell(rollout.introduction)
        rollout.tell(env.introduction)
        conductor = await env.meet("conductor", "conductor")
        trainer = await env.meet("trainer-0", "trainer")
        rollout.tell(conductor.introduction)
        assert config.policy is not None
        policy, published = publish(tmp_path, config.policy, 0)
        conductor.endpoint.connect(rollout.spec.peer, rollout.introduction.address)
        conductor.endpoint.send(rollout.spec.peer, published)
        groups = trainer.router.consumer("groups", capacity=2)
        groups.add_producer(env.spec.peer)
        tickets = conductor.router.producer("tickets", bound=2)
        tickets.add_consumer(env.spec.peer)
        ticket = {
            **{"group": 5, "attempt": 0, "run_attempt": 0, "seed": 11, "step": 0, "version": 0},
            **{"exact": True, "group_size": config.rollout.group_size},
        }
        await tickets.put(ticket)
        item = await groups.get()
        item.ack()
        return policy, item.payload


def test_an_episode_is_played_in_chunks(run: Run, tmp_path: Path) -> None:
    """What was observed and sampled is in the group; steps that the episode's end left out are masked."""

    async def main() -> None:
        config = config_of(ignore_terminations=True)
        policy, group = await asyncio.wait_for(play(tmp_path, config), 30)
        assert group.group == 5
        assert len(group.segments) == config.rollout.group_size
        first, second = group.segments
        assert [len(segment.turns) for segment in group.segments] == [3, 3]
        # One seed, so one start; draws of their own, so two ways.
        starts = [segment.turns[0].observation["state"] for segment in group.segments]
        np.testing.assert_array_equal(*starts)
        assert not np.array_equal(first.turns[0].action.chunk, second.turns[0].action.chunk)
        assert first.truncated
        assert first.bootstrap["state"].shape == (4,)
        masks = [turn.action.mask.tolist() for turn in first.turns]
        assert masks == [[True] * 3, [True] * 3, [True, False, False]]
        assert set(first.turns[0].action.versions.tolist()) == {0}
        assert config.policy is not None
        for segment in group.segments:
            turns = segment.turns
            read = policy.evaluate(
                stack([turn.observation for turn in turns], config.policy, "cpu"),
                {
                    "sample": torch.from_numpy(
                        np.stack([t.action.recompute["sample"] for t in turns])
                    )
                },
            )
            sampled = np.stack([turn.action.logprobs for turn in turns])
            np.testing.assert_allclose(read.logprobs.detach(), sampled, atol=1e-5)
            values = [turn.action.value for turn in turns]
            np.testing.assert_allclose(read.values.detach(), values, atol=1e-5)

    run(main)


def test_the_same_group_is_played_the_same(run: Run, tmp_path: Path) -> None:
    """Draws are keyed: by other actors, at another time."""

    async def main() -> None:
        groups = []
        for folder in ("one", "two"):
            groups.append((await asyncio.wait_for(play(tmp_path / folder, config_of()), 30))[1])
        for one, other in zip(groups[0].segments, groups[1].segments, strict=True):
            assert len(one.turns) == len(other.turns)
            for a, b in zip(one.turns, other.turns, strict=True):
                np.testing.assert_array_equal(a.action.chunk, b.action.chunk)
                assert a.reward == b.reward

    run(main)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"observation": {"pixels": [4]}}, "it shows no pixels"),
        ({"observation": {"state": [5]}}, "state has shape [4], not [5]"),
        ({"action": 3}, "an action has shape [2]"),
        ({"discrete": True}, "an action has shape [2]"),
        ({"high": 2.0}, "number 0 of an action lies between -1.0 and 1.0, not -1.0 and 2.0"),
    ],
)
def test_a_policy_that_does_not_fit_is_told_what_would(change: dict[str, Any], said: str) -> None:
    """The error has the lines to write."""
    env = make("point_reach", num_slots=1, args={})
    with pytest.raises(SimError) as raised:
        check_fit(PolicyConfig(**{**POLICY, **change}), env)
    assert said in str(raised.value)
    assert "observation = { state = [4] }\naction = 2\nlow = [-1.0, -1.0]" in str(raised.value)


def test_a_text_task_is_no_simulator() -> None:
    """Told both ways round, with the way out."""
    text, robot = (make(task, num_slots=1, args={}) for task in ("arithmetic", "point_reach"))
    check_fit(None, text)
    with pytest.raises(SimError, match="leave \\[policy\\] out"):
        check_fit(PolicyConfig(**POLICY), text)
    with pytest.raises(SimError, match="needs a \\[policy\\]"):
        check_fit(None, robot)


def test_deterministic_actions_are_a_batch_of_their_own() -> None:
    """An evaluation's requests beside training's: each is answered as it asked, none is forgotten."""
    config = config_of()
    assert config.policy is not None
    sampler = ArraySampler(config, device="cpu", counters={})
    sampler.take_device()
    state = {"state": np.zeros(4, dtype=np.float32)}

    def work(group: int, temperature: float | None) -> Any:
        request = TurnRequest(
            **{
                "group": group,
                "attempt": 0,
                "run_attempt": 0,
                "turn": 0,
                "version": 0,
                "exact": True,
            },
            samples=tuple(
                SampleRequest(sample=i, history=NO_TOKENS, observation=state) for i in range(2)
            ),
            sampling=None if temperature is None else Sampling(temperature=temperature),
        )
        return SimpleNamespace(request=request, requests=(request,))

    waiting = [work(0, None), work(1, 0.0), work(2, 1.0), work(3, 0.0)]
    for expected, greedy in (([0, 2], False), ([1, 3], True)):
        advanced = sampler.advance(waiting, lambda: False)
        assert [w.request.group for w in advanced.started] == expected
        for _, (one, other) in advanced.finished:
            assert one is not None
            assert other is not None
            assert np.array_equal(one.chunk, other.chunk) is greedy
            assert (one.sampling.temperature == 0) is greedy
        waiting = [w for w in waiting if w not in advanced.started]
    assert not waiting
