"""The supervised phase on conversations: which tokens it reads, and which of them it trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.conductor.config import JobSection
from actors.env.config import EnvConfig
from actors.job_config import JobConfig
from actors.models.config import ModelConfig
from actors.models.loading import build_model
from actors.models.text_policy import TextPolicy
from actors.trainer.config import WarmupConfig
from actors.trainer.warmup import encode_turns, turns_of, warm_up
from sim.contract import ChatMessage, TextObservation
from sim.text.guess_number import GuessNumber

MODEL = ModelConfig(
    hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, initializer_range=0.15
)


class Bisection:
    """Games without chance: every guess is the middle."""

    def __init__(self) -> None:
        self._game = GuessNumber(num_slots=1, high=3)

    def conversations(self, seeds: Sequence[int]) -> list[list[ChatMessage]]:
        return self._game.conversations(seeds, noise=0.0)


def message(role: str, content: str) -> ChatMessage:
    return ChatMessage(role=role, content=content)


def train(tmp_path: Path, task: Any, *, steps: int, batch_size: int = 16) -> list[dict[str, Any]]:
    """What a phase on the task reports."""
    config = JobConfig(
        job=JobSection(name="toy", steps=1),
        env=EnvConfig(task="of:Mine"),
        model=MODEL,
        warmup=WarmupConfig(
            steps=steps, until_reward=0.8, batch_size=batch_size, learning_rate=1e-2
        ),
    )
    model, tokenizer = build_model(MODEL, seed=0)
    reports: list[dict[str, Any]] = []
    policy = TextPolicy(tokenizer)
    warm_up(model, policy, tokenizer, task, config, tmp_path, lambda **data: reports.append(data))
    return reports


def mean_loss(text: str, answers: Sequence[str]) -> float:
    """Of the untrained model, over the tokens of `answers` where they stand in `text`, each with its end."""
    model, tokenizer = build_model(MODEL, seed=0)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    places: list[int] = []
    for answer in answers:
        own = tokenizer.encode(f"<|assistant|>{answer}<eos>", add_special_tokens=False)
        start = next(i for i in range(len(tokens)) if tokens[i : i + len(own)] == own)
        places += range(start + 1, start + len(own))
    return -float(np.mean([float(logprobs[i - 1, tokens[i]]) for i in places]))


def test_every_assistant_turn_and_nothing_else_carries_loss(tmp_path: Path) -> None:
    """The loss of the first update, by hand: answers and the ends of their turns."""

    class Task:
        def conversations(self, seeds: Sequence[int]) -> list[list[ChatMessage]]:
            game = [
                message("system", "be brief"),
                message("user", "1 to 9?"),
                message("assistant", "5"),
                message("user", "higher"),
                message("assistant", "I say 8"),
            ]
            return [game for _ in seeds]

    (report,) = train(tmp_path, Task(), steps=1, batch_size=2)
    text = (
        "<|system|>be brief<eos><|user|>1 to 9?<eos><|assistant|>5<eos>"
        "<|user|>higher<eos><|assistant|>I say 8<eos>"
    )
    assert report["loss"] == pytest.approx(mean_loss(text, ["5", "I say 8"]), abs=1e-4)


def test_an_assistants_turn_in_a_first_observation_is_prompt(tmp_path: Path) -> None:
    """Of an example, worked ones before the question included, only the answer is trained."""

    class Task:
        def examples(self, seeds: Sequence[int]) -> list[tuple[TextObservation, str]]:
            shown = (message("user", "1+1"), message("assistant", "2"), message("user", "3+4"))
            return [(TextObservation(messages=shown), "7") for _ in seeds]

    (report,) = train(tmp_path, Task(), steps=1, batch_size=2)
    text = "<|user|>1+1<eos><|assistant|>2<eos><|user|>3+4<eos><|assistant|>7<eos>"
    assert report["loss"] == pytest.approx(mean_loss(text, ["7"]), abs=1e-4)


def test_conversations_become_the_tokens_of_rollouts() -> None:
    """A game played again turn by turn, with the history of tokens that an env actor keeps."""
    _, tokenizer = build_model(MODEL, seed=0)
    policy = TextPolicy(tokenizer)
    env = GuessNumber(num_slots=1, high=31)
    compared = 0
    for seed, conversation in enumerate(env.conversations(range(20))):
        parts = encode_turns(policy, tokenizer, turns_of(conversation))
        history = np.zeros(0, dtype=np.int32)
        (observation,) = env.reset([0], [seed])
        for prompt, answer in zip(parts[::2], parts[1::2], strict=True):
            assert prompt == policy.encode(history, observation).tolist()
            assert answer[-1] in policy.stop_tokens
            (result,) = env.step([0], [policy.decode(np.array(answer, dtype=np.int32))])
            observation = result.observation
            history = np.array([*history, *prompt, *answer], dtype=np.int32)
            compared += 1
        assert result.terminated or result.truncated
    assert compared > 20 * 2


def test_it_learns_every_turn(tmp_path: Path) -> None:
    """Whole games of bisection become likely, and the phase ends there."""
    last = train(tmp_path, Bisection(), steps=100)[-1]
    assert last["expected_reward"] >= 0.8
    assert last["step"] < 100


@pytest.mark.parametrize("roles", [[], ["user"], ["user", "assistant", "user"]])
def test_a_conversation_ends_with_an_answer(roles: list[str]) -> None:
    """What follows the last answer would be trained by nobody; the roles are told."""
    with pytest.raises(ValueError, match=f"its roles are {', '.join(roles) or 'none'}"):
        turns_of([message(role, "x") for role in roles])
