"""Jobs that only evaluate: made from a run or a model folder, and their results as rows of a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from actors.conductor.config import EvalConfig, JobSection, MetricsConfig
from actors.env.config import EnvConfig
from actors.job_config import JobConfig
from actors.models.config import ModelConfig
from actors.rollout.config import RolloutConfig
from actors.trainer.config import WarmupConfig

MAX_NAME = 64  # of a job
replace = msgspec.structs.replace


def evaluation_of_run(trained: JobConfig, name: str) -> JobConfig:
    """The job that evaluates the model of a run as the run evaluates itself; `with_weights` says which weights."""
    job = replace(trained.job, name=name, steps=0, mode="disaggregated", stop_reward=None)
    return replace(
        trained,
        job=job,
        rollout=replace(trained.rollout, group_size=1),
        warmup=WarmupConfig(),
        metrics=replace(trained.metrics, tensorboard=False),
    )


def evaluation_of_model(task: str, name: str, model: Path) -> JobConfig:
    """The job that evaluates a model folder on a task."""
    return JobConfig(
        job=JobSection(name=name, steps=0),
        env=EnvConfig(task=task, actors=1),
        model=ModelConfig(path=str(model)),
        rollout=RolloutConfig(devices=1, group_size=1),
        metrics=MetricsConfig(tensorboard=False),
    )


def with_weights(config: JobConfig, folder: Path) -> JobConfig:
    """The job with the model or policy of a folder that was exported."""
    if config.policy is not None:
        return replace(config, policy=replace(config.policy, path=str(folder)))
    return replace(config, model=ModelConfig(path=str(folder)))


def with_task(config: JobConfig, task: str) -> JobConfig:
    """The job on another task, whose arguments are its own; on the run's own task, as it was."""
    if task == (config.eval.task or config.env.task):
        return config
    named = "" if task == config.env.task else task
    return replace(config, eval=replace(config.eval, task=named, args={}))


def decoding(config: EvalConfig, *, greedy: bool, temperature: float | None) -> EvalConfig:
    """Only the likeliest tokens, only samples at a temperature, or as it was."""
    if greedy:
        return replace(config, k=0, greedy=True)
    if temperature is not None:
        return replace(config, k=max(config.k, 1), greedy=False, temperature=temperature)
    return config


def free_name(runs: Path, stem: str) -> str:
    """A name of a job that no run has: eval-STEM-1, eval-STEM-2, …"""
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem)
    number = 1
    while True:
        end = f"-{number}"
        name = f"eval-{stem}"[: MAX_NAME - len(end)] + end
        if not (runs / name).exists():
            return name
        number += 1


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each way of decoding, of all problems and of each part of them."""
    settings = result["settings"]
    sampled = f"temperature {settings['temperature']:g}"
    if settings.get("top_k"):
        sampled += f", top {settings['top_k']}"
    made = []
    for part, numbers in {"all": result, **result.get("by", {})}.items():
        for mode, shown in (("sampled", sampled), ("greedy", "greedy")):
            if mode not in numbers:
                continue
            found = numbers[mode]
            low, high = found["reward_low"], found["reward_high"]
            row = {
                "problems of": part,
                "decoding": shown,
                "problems": numbers["problems"],
                "samples": found["samples"],
                "score": found["reward_mean"],
                "95 % interval": "" if low is None else f"{low:.3f} to {high:.3f}",
            }
            row |= {
                key: f"{rate['rate']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"
                for key, rate in found["success"].items()
            }
            if "max_new_tokens" in settings or numbers["problems"] < found["samples"]:
                row |= {f"pass@{k}": rate for k, rate in found["pass_at"].items()}
            if "max_new_tokens" in settings:
                row["tokens"] = found["tokens_mean"]
            row |= {key: value for key, value in found["info"].items() if key not in row}
            made.append(row)
    return made


def columns(made: list[dict[str, Any]]) -> list[str]:
    """Every key of the rows, in the order of the first row that has most of them."""
    longest = max(made, key=lambda row: len(row))
    return list(dict.fromkeys([*longest, *(key for row in made for key in row)]))
