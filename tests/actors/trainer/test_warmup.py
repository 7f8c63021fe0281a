"""The supervised phase: what it learns, where it stops, and what its cache depends on."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from actors.conductor.config import JobSection
from actors.env.config import EnvConfig
from actors.job_config import JobConfig
from actors.models.config import ModelConfig
from actors.models.loading import build_model, save_pretrained_folder
from actors.models.text_policy import TextPolicy
from actors.trainer.config import WarmupConfig
from actors.trainer.warmup import answer_logprobs, cache_key, warm_up
from sim.contract import split_counted_seed
from sim.text.arithmetic import Arithmetic

JOB = JobConfig(
    job=JobSection(name="toy", steps=1, seed=4),
    env=EnvConfig(task="arithmetic", args={"min_digits": 1, "max_digits": 1}),
    model=ModelConfig(
        hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, initializer_range=0.15
    ),
    warmup=WarmupConfig(steps=25, batch_size=16, learning_rate=1e-2),
)


class Once:
    """A task whose one answer is easy to learn."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.counted_seeds = False
        self._task = Arithmetic(num_slots=1, min_digits=1, max_digits=1)

    def examples(self, seeds: list[int]) -> list[tuple[Any, str]]:
        self.seeds += seeds
        return [(observation, "7") for observation, _ in self._task.examples(seeds)]


def run(
    tmp_path: Path, config: JobConfig = JOB, task: Any = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Parameters after the phase, and what was reported."""
    model, tokenizer = build_model(config.model, seed=config.job.seed)
    reports: list[dict[str, Any]] = []
    policy = TextPolicy(tokenizer, generation_config=model.generation_config)
    task = task or Once()
    warm_up(model, policy, tokenizer, task, config, tmp_path, lambda **data: reports.append(data))
    return {name: p.detach().clone() for name, p in model.named_parameters()}, reports


def warmed(**changes: Any) -> JobConfig:
    return msgspec.structs.replace(JOB, warmup=msgspec.structs.replace(JOB.warmup, **changes))


def test_it_learns_the_examples(tmp_path: Path):
    """The answer with its end becomes likely; every report is a place on the way."""
    _, reports = run(tmp_path)
    assert [report["step"] for report in reports] == [20, 25]
    assert reports[-1]["loss"] < 0.1 < reports[0]["loss"] + 0.1
    assert reports[-1]["expected_reward"] > 0.8
    assert not any(report["cached"] for report in reports)


def test_task_that_counts_is_asked_for_one_example_after_the_other(tmp_path: Path):
    """So that a file of prompts is gone through epoch by epoch here too."""
    task = Once()
    task.counted_seeds = True
    run(tmp_path, warmed(steps=3), task)
    keys, indices = zip(*map(split_counted_seed, task.seeds), strict=True)
    assert len(set(keys)) == 1
    assert list(indices) == list(range(len(indices)))
    assert len(indices) >= 3 * JOB.warmup.batch_size


def test_it_stops_at_the_expected_reward(tmp_path: Path):
    """As soon as the mean of the last 10 updates is there, and not before there are 10."""
    _, [*_, last] = run(tmp_path, warmed(steps=500, until_reward=0.3))
    assert 10 <= last["step"] < 25
    assert 0.3 <= last["expected_reward"] < 0.6


def test_a_temperature_below_one_leaves_the_policy_less_sure(tmp_path: Path):
    """After as many updates the right answers are less likely at temperature 1."""
    _, [*_, plain] = run(tmp_path)
    _, [*_, tempered] = run(tmp_path, warmed(temperature=0.3))
    assert tempered["expected_reward"] < 0.8 * plain["expected_reward"]


def test_an_equal_phase_is_paid_for_once(tmp_path: Path):
    """The cached result is the same to the last bit; no part of a file is ever visible under its name."""
    first, _ = run(tmp_path)
    task = Once()
    again, reports = run(tmp_path, task=task)
    assert reports == [{"step": 25, "steps": 25, "cached": True}]
    assert task.seeds == []
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_examples_are_fresh_and_belong_to_the_seed(tmp_path: Path):
    """None twice; another job seed has others; all in the range of an environment's seeds."""
    tasks = [Once(), Once()]
    run(tmp_path, task=tasks[0])
    other = msgspec.structs.replace(JOB, job=msgspec.structs.replace(JOB.job, seed=5))
    run(tmp_path, other, task=tasks[1])
    seeds = tasks[0].seeds + tasks[1].seeds
    assert len(seeds) == len(set(seeds)) == 2 * 25 * 16
    assert 0 <= min(seeds) <= max(seeds) < 2**63


def test_the_key_tells_apart_all_that_the_result_depends_on(tmp_path: Path):
    """Seed, model and its files, task, arguments, the phase; not the name of the job."""
    task = Once()

    def with_section(section: str, **changes: Any) -> JobConfig:
        values = msgspec.structs.replace(getattr(JOB, section), **changes)
        return msgspec.structs.replace(JOB, **{section: values})

    key = cache_key(JOB, task)
    assert cache_key(with_section("job", name="other", steps=9), task) == key
    model, tokenizer = build_model(JOB.model, seed=0)
    save_pretrained_folder(model, tokenizer, tmp_path / "model")
    from_folder = with_section("model", path=str(tmp_path / "model"))
    keys = [
        key,
        cache_key(with_section("job", seed=5), task),
        cache_key(with_section("model", hidden_size=64), task),
        cache_key(with_section("env", args={"min_digits": 2, "max_digits": 2}), task),
        cache_key(with_section("env", task="other"), task),
        cache_key(with_section("warmup", steps=26), task),
        cache_key(JOB, Arithmetic(num_slots=1)),  # the code of another module
        cache_key(from_folder, task),
    ]
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other weights")
    keys.append(cache_key(from_folder, task))
    assert len(set(keys)) == len(keys)


def test_log_probs_are_of_the_answers_alone():
    """Against one example at a time, written out."""
    model, _ = build_model(JOB.model, seed=0, dtype=torch.float64)
    random = np.random.default_rng(0)
    examples = [
        (random.integers(8, 90, p).tolist(), random.integers(8, 90, a).tolist())
        for p, a in [(3, 2), (6, 1), (1, 4)]
    ]
    with torch.no_grad():
        tempered, logprobs, rows = answer_logprobs(model, examples, 0.5)
        expected, expected_tempered = [], []
        for prompt, answer in examples:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
            for i, token in enumerate(answer):
                at = logits[len(prompt) + i - 1]
                expected.append(float(at.log_softmax(-1)[token]))
                expected_tempered.append(float((at / 0.5).log_softmax(-1)[token]))
    assert tempered.tolist() == pytest.approx(expected_tempered, abs=1e-5)
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)
    assert rows.tolist() == [0, 0, 1, 2, 2, 2, 2]


def test_a_task_without_examples_is_refused(tmp_path: Path):
    """It says what to set."""
    with pytest.raises(ValueError, match=r"steps = 25, but task \"arithmetic\" has no worked"):
        run(tmp_path, task=object())


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tmp_path: Path):
    """The model would never learn to stop."""
    model, tokenizer = build_model(JOB.model, seed=0)
    policy = TextPolicy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no eos_token"):
        warm_up(model, policy, tokenizer, Once(), JOB, tmp_path, lambda **_: None)
