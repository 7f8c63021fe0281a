"""Conversations of several turns through the whole pipeline: what the model reads, and what carries loss."""

import asyncio
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flowd_process import lines_of

from actors.backends.contract import GenerationRequest
from actors.backends.hf_engine import HFGenerationEngine
from actors.models.tokenizer import build_characters_tokenizer
from actors.randomness import fold
from actors.rollout.work import KEY_OF_SAMPLE
from flowd.inline import run_inline
from flowd.job import load_job

CONFIG = Path(__file__).parents[2] / "configs" / "guess_number_grpo.toml"
STEPS, GROUPS, GROUP_SIZE, TURNS = 2, 3, 4, 5
UNTRAINED = (
    f"job.steps={STEPS}",
    f"job.groups_per_step={GROUPS}",
    "job.max_staleness=0",
    f"rollout.group_size={GROUP_SIZE}",
    f"metrics.samples_per_step={GROUPS}",
    "metrics.tensorboard=false",
    "warmup.steps=0",
)


def run(tmp_path: Path, changes: tuple[str, ...]) -> tuple[list[dict[str, Any]], ...]:
    """Run the shipped job inline, changed; returns the lines of metrics.jsonl and samples.jsonl."""
    config = load_job(CONFIG, changes)
    job = asyncio.run(run_inline(config, tmp_path, tmp_path / "cache", lambda kind, data: None))
    assert job.status()["state"] == "done", job.status()
    return list(lines_of(tmp_path / "metrics.jsonl")), list(lines_of(tmp_path / "samples.jsonl"))


def episodes(samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The turns of every episode, in order."""
    found = [list(turns) for _, turns in groupby(samples, lambda s: (s["group"], s["sample"]))]
    for turns in found:
        assert [turn["turn"] for turn in turns] == list(range(len(turns)))
    return found


def canonical(text: str) -> list[int]:
    """The tokens that a reply's text would become."""
    ids: list[int] = build_characters_tokenizer().encode(text, add_special_tokens=False)
    return ids


def test_history_is_token_for_token_what_was_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine reads in turn n is every prompt and sampled token so far, where text would give others."""
    read: dict[int, list[int]] = {}
    add = HFGenerationEngine.add

    def watched(engine: HFGenerationEngine, request: GenerationRequest) -> None:
        assert not len(request.sampled)  # nothing is suspended here: the context is all there is
        assert request.key not in read
        read[request.key] = request.context.tolist()
        add(engine, request)

    monkeypatch.setattr(HFGenerationEngine, "add", watched)
    _, samples = run(tmp_path, UNTRAINED)
    played = episodes(samples)
    assert len(played) == STEPS * GROUPS
    assert max(map(len, played)) == TURNS
    retokenized = 0
    for turns in played:
        history: list[int] = []
        for turn in turns:
            history += turn["prompt_tokens"]
            key = fold(0, KEY_OF_SAMPLE, turn["group"], turn["sample"], turn["turn"])
            assert read[key] == history
            history += turn["tokens"]
            end = [t for t in turn["tokens"] if t == build_characters_tokenizer().eos_token_id]
            retokenized += canonical(turn["text"]) + end != turn["tokens"]
    # An untrained model says special tokens too, which its text leaves out: tokenizing again would show.
    assert retokenized > len(samples) / 10


def test_only_the_models_own_tokens_carry_loss(tmp_path: Path) -> None:
    """The trainer finds, on exactly as many tokens, the very log-probs that they were sampled with.

    A token of a prompt or of the task's answers among them, or one place beside, and the ratio of trainer to
    sampler would not be 1: the untrained model is far from uniform.
    """
    metrics, samples = run(tmp_path, UNTRAINED)
    assert len(metrics) == STEPS
    for line in metrics:
        assert line["tokens_trained"] == line["tokens"] > 0
        assert line["ratio_mean"] == pytest.approx(1.0, abs=1e-4)
        assert 0 <= line["kl_sampler"] < 1e-6
    logprobs = np.concatenate([turn["logprobs"] for turn in samples])
    assert logprobs.std() > 0.5


def test_a_turn_shows_the_tasks_answer_to_the_turn_before(tmp_path: Path) -> None:
    """Only what is new is rendered, closed where the model did not end its turn itself; reward comes last."""
    _, samples = run(tmp_path, UNTRAINED)
    tokenizer = build_characters_tokenizer()
    for turns in episodes(samples):
        assert turns[0]["prompt"] == "1 to 31?"
        for before, turn in pairwise(turns):
            assert turn["prompt"] in (
                "higher",
                "lower",
                "not a number: guess a whole number from 1 to 31",
            )
            ended = before["tokens"][-1] == tokenizer.eos_token_id
            assert ended == (before["finish"] == "stop")
            close = "" if ended else "<eos>"
            assert (
                tokenizer.decode(turn["prompt_tokens"])
                == f"{close}<|user|>{turn['prompt']}<eos><|assistant|>"
            )
            assert before["reward"] == 0.0
        assert turns[-1]["reward"] == turns[-1]["info"]["correct"]
        assert len(turns) == turns[-1]["info"]["guesses"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_reward_rises(tmp_path: Path) -> None:
    """Warm-up on played games, then 40 steps on the range 1 to 15: from about half of the games to most of them."""
    changes = ("env.args.high=15", "env.args.max_guesses=4", "job.steps=40", "job.stop_reward=0.9")
    metrics, _ = run(tmp_path, changes)
    rewards = [line["reward_mean"] for line in metrics]
    assert np.mean(rewards[:3]) < 0.65
    assert np.mean(rewards[-5:]) > 0.85
