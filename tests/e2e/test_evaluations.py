"""Evaluations beside training and by `flowctl eval`, as a user sees them."""

import json
from pathlib import Path
from typing import Any

import pytest
from flowd_process import FAST, Flowd, kill, lines_of

from actors.models.config import ModelConfig
from actors.models.loading import build_model, save_pretrained_folder

STEPS = 10
EVAL = ("eval.every_steps=5", "eval.problems=12", "eval.k=4", "eval.record=12")
CHANGES = (f"job.steps={STEPS}", "env.task=e2e_tasks:Parity", "env.args={}", *EVAL)
SAID = ("problem", "mode", "sample", "prompt", "text", "reward")


def evaluations(flowd: Flowd, name: str) -> list[dict[str, Any]]:
    return [line for line in flowd.metrics(name) if "eval_problems" in line]


def said(flowd: Flowd, name: str, step: int) -> list[tuple[Any, ...]]:
    """What was asked and answered in the evaluation of a step, in order."""
    lines = lines_of(flowd.run(name).eval_samples)
    return sorted(tuple(line[key] for key in SAID) for line in lines if line["step"] == step)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {mode: result[mode] for mode in ("sampled", "greedy", "rewards")}


@pytest.fixture(scope="module")
def evaluated(shared_flowd: Flowd) -> str:
    """A job with evaluations, run on flowd to its end."""
    if not shared_flowd.is_up():
        shared_flowd.up()
    shared_flowd.submit("evaluated", *CHANGES)
    shared_flowd.wait_done("evaluated")
    return "evaluated"


def test_a_job_is_evaluated_before_beside_and_after_its_training(
    flowd: Flowd, evaluated: str
) -> None:
    """One line each, of the same problems; steps have theirs, and the ledger knows of groups alone."""
    lines = evaluations(flowd, evaluated)
    assert [(line["step"], line["attempt"]) for line in lines] == [(0, 0), (5, 0), (10, 0)]
    flowd.check_done(evaluated, steps=STEPS)
    for line in lines:
        assert line["eval_reward_low"] <= line["eval_reward_mean"] <= line["eval_reward_high"]
        assert 0 < line["eval_reward_mean"] < 1, "the task's rewards differ"
        rates = [line[f"eval_pass_at_{k}"] for k in (1, 2, 4)]
        assert rates == sorted(rates)
        assert rates[0] == pytest.approx(line["eval_reward_mean"], abs=1e-6)
        assert 0 <= line["eval_greedy"] <= 1
    prompts = [[prompt for *_, prompt, _, _ in said(flowd, evaluated, step)] for step in (0, 5, 10)]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[0]) == 12 * 5
    shown = flowd.ctl("samples", evaluated, "--eval", "--step", "5")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("problem 3  sampled") == 4


def test_the_command_gives_the_numbers_of_the_jobs_own_evaluation(
    flowd: Flowd, evaluated: str
) -> None:
    """Of the run's last commit: the same answers to the same problems. Another seed has others."""
    own = json.loads((flowd.run(evaluated).root / "evals" / "step-00000010.json").read_text())
    result = flowd.ctl_json("eval", evaluated)
    assert (result["of_step"], result["job"]) == (STEPS, "eval-evaluated-1")
    assert numbers(result) == numbers(own)
    assert said(flowd, "eval-evaluated-1", 0) == said(flowd, evaluated, STEPS)
    kept = flowd.run(evaluated).root / "evals" / "eval-evaluated-1.json"
    assert json.loads(kept.read_text()) == result
    assert flowd.audit("eval-evaluated-1")["groups"] == 0
    other = flowd.ctl_json("eval", evaluated, "--inline", "--best", "--seed", "1", "--greedy")
    scores = {line["step"]: line["eval_reward_mean"] for line in evaluations(flowd, evaluated)}
    assert other["of_step"] == max((5, 10), key=lambda step: (scores[step], step))
    assert "sampled" not in other
    prompts = {prompt for *_, prompt, _, _ in said(flowd, evaluated, STEPS)}
    assert {prompt for *_, prompt, _, _ in said(flowd, "eval-evaluated-2", 0)} != prompts
    assert not list(flowd.paths.cache.glob("eval-*")), "the written policies are gone"


def test_a_model_folder_is_evaluated_on_any_task(tmp_path: Path) -> None:
    """Without a flowd and without a run, as a table; arguments as in a job file."""
    folder = tmp_path / "tiny"
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    save_pretrained_folder(*build_model(config, seed=3), folder)
    words = ["eval", str(folder), "--task", "arithmetic", "--args", "min_digits=1", "max_digits=1"]
    words += ["--k", "2", "--episodes", "5"]
    words += ["--set", "rollout.max_new_tokens=4", "--set", "rollout.max_context_tokens=32"]
    done = Flowd(tmp_path / "home").ctl(*words)
    assert done.returncode == 0, done.stderr
    header, sampled, greedy = done.stdout.splitlines()
    assert [c.strip() for c in header.split("  ") if c][:3] == [
        "problems of",
        "decoding",
        "problems",
    ]
    assert sampled.split()[:5] == ["all", "temperature", "1", "5", "10"]
    assert greedy.split()[:4] == ["all", "greedy", "5", "5"]
    (kept,) = (tmp_path / "home" / "evals").glob("*.json")
    assert json.loads(kept.read_text())["settings"]["max_new_tokens"] == 4


def test_what_cannot_be_evaluated_is_refused(flowd: Flowd, evaluated: str, tmp_path: Path) -> None:
    """Exit code 2 and a way out, with nothing run."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    for words, said_ in (
        (["nosuch"], 'no job "nosuch"'),
        ([str(tmp_path / "nosuch")], "has neither config.json"),
        ([str(bare)], "say on what to evaluate it, with --task"),
        ([evaluated, "--step", "3"], "no commit of step 3: there are 5, 10"),
        ([evaluated, "--problems", "0"], "[eval] problems = 0 is out of range"),
        ([evaluated, "--k", "999"], "max_running = 256"),
    ):
        done = flowd.ctl("eval", *words)
        assert done.returncode == 2, (words, done.stderr)
        assert said_ in done.stderr


@pytest.mark.slow
def test_killed_in_an_evaluation_it_is_taken_once_for_the_weights_that_stay(flowd: Flowd) -> None:
    """The trainer dies again and again while evaluations go on: each step has one that counts, of its own weights."""
    changes = [*CHANGES, "job.deterministic=true", "checkpoint.every_steps=2", "job.steps=20"]
    flowd.submit("cut", *changes)
    for step in (4, 9):
        flowd.wait_step("cut", step)
        kill(flowd.pid_of("cut", "trainer-0"))
    flowd.wait_done("cut")
    flowd.check_done("cut", steps=20)
    flowd.submit("calm", *changes)
    flowd.wait_done("calm")
    keys = ("eval_reward_mean", "eval_greedy", "eval_pass_at_2", "eval_tokens_mean")
    last = {line["step"]: [line[key] for key in keys] for line in evaluations(flowd, "cut")}
    calm = {line["step"]: [line[key] for key in keys] for line in evaluations(flowd, "calm")}
    assert sorted(last) == [0, 5, 10, 15, 20]
    assert last == calm
    told = [(line["step"], line["attempt"]) for line in evaluations(flowd, "cut")]
    assert len(told) == len(set(told))


def test_a_job_is_followed_with_its_evaluations(flowd: Flowd, tmp_path: Path) -> None:
    """A line each between those of the steps; stages take turns on one device."""
    words = [
        "--set",
        "job.name=turns",
        "--set",
        "job.mode=collocated",
        "--set",
        "rollout.devices=1",
    ]
    words += [
        word for change in (*CHANGES, "checkpoint.every_steps=1") for word in ("--set", change)
    ]
    done = flowd.ctl("submit", str(FAST), "--follow", *words)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("eval")]
    assert len(lines) == 3
    assert all("pass@4=" in line and "greedy=" in line for line in lines)
    flowd.check_done("turns", steps=STEPS)
