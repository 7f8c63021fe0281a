"""A conversation through real env, rollout and trainer actors: what the policy sees, and what carries loss."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from actor_stage import JOB, Peer, Stage, job_config

from actors.backends.contract import Generation, GenerationRequest
from actors.backends.training_batches import lay_out
from actors.episodes import Group
from actors.models.config import ModelConfig
from channels.inline import InlineHub
from channels.lifecycle import Ready
from channels.weights import WeightsPublished
from channels.work import Admit, BeginRun, GroupReceived, StepDone, TrainerReady

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

torch.set_num_threads(1)
TURNS = 3
GROUPS = 2
MODEL = ModelConfig(
    hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32, initializer_range=0.3
)


class Watched:
    """Every request that the engine got, and what it gave for it."""

    def __init__(self, engine: Any) -> None:
        self.requests: dict[int, GenerationRequest] = {}
        self.generations: dict[int, Generation] = {}
        add, step = engine.add, engine.step

        def watched_add(request: GenerationRequest) -> None:
            self.requests[request.request_id] = request
            add(request)

        def watched_step() -> list[Generation]:
            generations: list[Generation] = step()
            self.generations.update({g.request_id: g for g in generations})
            return generations

        engine.add, engine.step = watched_add, watched_step


async def play(tmp_path: Path) -> tuple[Watched, list[Group], Any]:
    """One step of a job of several turns; the test is its conductor."""
    config = job_config(
        job={"groups_per_step": GROUPS},
        env={"task": "guess_number", "args": {"low": 1, "high": 999}, "max_turns": TURNS},
        rollout={"max_new_tokens": 6, "max_context_tokens": 256},
        model=MODEL,
    )
    hub = InlineHub()
    env = Stage(tmp_path, "env", config, hub=hub)
    rollout = Stage(tmp_path, "rollout", config, hub=hub, devices=("cpu:0",))
    trainer = Stage(tmp_path, "trainer", config, hub=hub, devices=("cpu:1",))
    async with env, rollout, trainer:
        for stage in (env, rollout, trainer):
            await stage.heard(Ready)
        for one, other in ((env, rollout), (env, trainer)):
            one.tell(other.introduction)
            other.tell(one.introduction)
        watched: list[Watched] = []
        take_device = rollout.actor.sampler.take_device

        def take_and_watch() -> None:
            take_device()
            watched.append(Watched(rollout.actor.sampler.engine))

        rollout.actor.sampler.take_device = take_and_watch
        trained: list[Group] = []
        accumulate = trainer.actor.engine.accumulate

        def record(groups: list[Group]) -> None:
            trained.extend(groups)
            accumulate(groups)

        trainer.actor.engine.accumulate = record

        conductor = Peer(env, f"{JOB}/conductor", "conductor", 0, 0)
        tickets = conductor.router.producer("tickets", bound=8)
        for stage in (env, rollout, trainer):
            await stage.introduce(conductor)
        await conductor.take(TrainerReady)
        conductor.endpoint.send(trainer.spec.peer, BeginRun(run_attempt=0, step=0))
        published = await conductor.take(WeightsPublished)
        conductor.endpoint.send(rollout.spec.peer, published)
        tickets.add_consumer(env.spec.peer)
        for group in range(GROUPS):
            await tickets.put(
                {
                    "group": group,
                    "attempt": 0,
                    "run_attempt": 0,
                    "seed": 31 + group,
                    "step": 0,
                    "version": 0,
                    "exact": True,
                    "group_size": 2,
                }
            )
        await conductor.take(GroupReceived, GROUPS)
        for group in range(GROUPS):
            conductor.endpoint.send(
                trainer.spec.peer,
                Admit(
                    group=group,
                    attempt=0,
                    step=0,
                    order=group,
                    last=group == GROUPS - 1,
                    commit=False,
                ),
            )
        await conductor.take(StepDone)
        policy = rollout.actor.sampler.policy
        conductor.endpoint.close()
    return watched[0], trained, policy


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Watched, list[Group], Any]:
    async def main() -> tuple[Watched, list[Group], Any]:
        async with asyncio.timeout(60.0):
            return await play(tmp_path_factory.mktemp("run"))

    return asyncio.run(main())


def test_later_turns_see_what_was_sampled_token_for_token(
    played: tuple[Watched, list[Group], Any],
) -> None:
    """The engine's context of turn n is prompts and sampled tokens so far, also where text would become others."""
    watched, groups, policy = played
    tokenizer = policy._tokenizer
    sampled = {
        (tuple(request.context.tolist()), tuple(watched.generations[i].tokens.tolist()))
        for i, request in watched.requests.items()
    }
    retokenized_differently = 0
    turns = 0
    for group in groups:
        for segment in group.segments:
            assert len(segment.turns) == TURNS
            so_far = np.zeros(0, dtype=np.int32)
            for turn in segment.turns:
                so_far = np.concatenate([so_far, turn.action.prompt])
                own = turn.action.tokens.tolist()
                assert (tuple(so_far.tolist()), tuple(own)) in sampled
                so_far = np.concatenate([so_far, turn.action.tokens])
                as_text = tokenizer.encode(turn.action.text, add_special_tokens=False)
                retokenized_differently += as_text not in (own, own[:-1])
                turns += 1
    assert turns == GROUPS * 2 * TURNS
    assert retokenized_differently > 0, "the case that this is about did not occur: other seeds"


def test_only_the_policys_own_tokens_carry_loss(
    played: tuple[Watched, list[Group], Any],
) -> None:
    """The trained positions of a conversation are those of the sampled tokens of all turns, with their log-probs."""
    _, groups, _ = played
    assert sorted(group.group for group in groups) == list(range(GROUPS))
    for group in groups:
        laid_out = lay_out([group])
        assert len(laid_out.sequences) == len(group.segments)
        for sequence, segment in zip(laid_out.sequences, group.segments, strict=True):
            tokens: list[int] = []
            own: list[bool] = []
            logprobs: list[float] = []
            for turn in segment.turns:
                action = turn.action
                tokens += [*action.prompt.tolist(), *action.tokens.tolist()]
                own += [False] * len(action.prompt) + [True] * len(action.tokens)
                logprobs += action.logprobs.tolist()
            assert sequence.tokens.tolist() == tokens
            assert sequence.positions.tolist() == [i for i, mine in enumerate(own) if mine]
            assert sequence.logprobs.tolist() == logprobs
            assert own.count(True) == segment.num_tokens > 0


def test_observations_say_what_the_task_answered(
    played: tuple[Watched, list[Group], Any],
) -> None:
    """Only what is new is shown in a turn: the question first, then one reply each."""
    _, groups, _ = played
    for group in groups:
        for segment in group.segments:
            shown = [turn.observation.messages for turn in segment.turns]
            assert shown[0][0].content.startswith("Guess my number from 1 to 999")
            for (reply,) in shown[1:]:
                assert reply.content.startswith(("higher", "lower", "not a number"))
