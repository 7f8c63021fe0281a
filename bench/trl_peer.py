"""The job of configs/arithmetic_grpo.toml by TRL's GRPOTrainer, in a process of its own. Driven by bench.versus_trl.

    python -m bench.trl_peer FOLDER --seed 0 --updates 200 --threads 1

The same warmed-up model (a Hugging Face folder), prompts in the same order, group size, sampling, learning rate and
schedule, Adam, clipping, and loss: the mean over all tokens of an update, without KL. Strictly on-policy, as TRL is.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.conductor.actor import SEED_OF_GROUP
from actors.job_config import JobConfig
from actors.randomness import fold
from bench.local import CONFIG
from flowd.job import load_job
from sim.contract import TextObservation
from sim.registry import make


def group_seeds(job_seed: int, count: int) -> list[int]:
    """Those of a job's first groups."""
    return [fold(job_seed, SEED_OF_GROUP, group) >> 1 for group in range(count)]


def prompts(config: JobConfig, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """A row of TRL's data set for each group: its conversation, and the seed that says what the answer is."""
    task = make(config.env.task, num_slots=1, args=config.env.args)
    rows = []
    for seed in seeds:
        (observation,) = task.reset([0], [seed])
        assert isinstance(observation, TextObservation)
        messages = [{"role": m.role, "content": m.content} for m in observation.messages]
        rows.append({"prompt": messages, "seed": seed})
    task.close()
    return rows


class TaskReward:
    """TRL's reward function: the task itself looks at the answers."""

    __name__ = "task"

    def __init__(self, config: JobConfig) -> None:
        samples = config.job.groups_per_step * config.rollout.group_size
        self._task = make(config.env.task, num_slots=samples, args=config.env.args)

    def __call__(
        self, *, completions: list[list[dict[str, str]]], seed: list[int], **_: Any
    ) -> list[float]:
        slots = range(len(completions))
        self._task.reset(slots, seed)
        return [
            result.reward
            for result in self._task.step(slots, [c[0]["content"] for c in completions])
        ]


def arguments(config: JobConfig, updates: int, folder: str) -> dict[str, Any]:
    """GRPOConfig's, for what the job says."""
    if (config.algorithm.name, config.algorithm.kl_coefficient) != ("grpo", 0.0):
        raise ValueError(f"[algorithm] {config.algorithm}: only grpo without KL is translated")
    samples = config.job.groups_per_step * config.rollout.group_size
    return {
        "output_dir": folder,
        "max_steps": updates,
        "per_device_train_batch_size": samples,
        "gradient_accumulation_steps": 1,
        "num_generations": config.rollout.group_size,
        "max_completion_length": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "top_k": config.rollout.top_k,
        "top_p": 1.0,
        "learning_rate": config.trainer.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": config.trainer.lr_warmup_steps,
        "optim": "adamw_torch_fused",
        "adam_beta1": config.trainer.betas[0],
        "adam_beta2": config.trainer.betas[1],
        "weight_decay": config.trainer.weight_decay,
        "max_grad_norm": config.trainer.max_grad_norm,
        "beta": 0.0,
        "epsilon": 0.2,
        "loss_type": "dapo",  # the mean over all tokens of the update, as [algorithm] name = "grpo"
        "scale_rewards": "group",
        "num_iterations": 1,
        "shuffle_dataset": False,
        "seed": config.job.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,  # faster without, and the memory is there
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def train(model_folder: Path, seed: int, updates: int) -> list[dict[str, float]]:
    """Of each update the mean reward, and seconds since the training began."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    config = load_job(CONFIG, [f"job.seed={seed}"])
    steps: list[dict[str, float]] = []
    began = 0.0

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "reward" in logs:
                seconds = time.perf_counter() - began
                steps.append({"reward_mean": float(logs["reward"]), "seconds": seconds})

    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder),
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            reward_funcs=TaskReward(config),
            args=GRPOConfig(**arguments(config, updates, folder)),
            train_dataset=Dataset.from_list(
                prompts(config, group_seeds(seed, updates * config.job.groups_per_step))
            ),
            callbacks=[Watch()],
        )
        trainer.train()
    return steps


def main() -> int:
    """One JSON object on stdout; whatever the libraries say goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(sys.stderr):
        steps = train(options.folder, options.seed, options.updates)
    print(json.dumps(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
