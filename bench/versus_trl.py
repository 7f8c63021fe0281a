"""The same GRPO run by TRL's GRPOTrainer and by flowd, on this machine's CPU cores.

    python -m bench.versus_trl --json        (pip install 'flowd[bench]')

The job is configs/arithmetic_grpo.toml. Both begin with the same warmed-up model and take the same prompts, group
size, learning rate and number of updates; bench.trl_peer says how TRL is set up. First each is tried for a few updates
with 1, 2, … threads (flowd: trainer ranks of one thread), and goes on with what was fastest. Then both run to the end,
in turns, once for each seed; numbers are medians over the seeds. Seconds begin with the first update: start and
warm-up are left out of both. TRL samples and trains in turns; flowd streams, one policy version apart as the job says.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.local import CONFIG, Flowd, MachineLoad, overrides, surroundings, tell
from flowd.job import load_job

GOAL = 0.9
WINDOW = 5  # updates that a reward is averaged over
WARM_IN_UPDATES = 5  # left out of samples/s: first kernels and caches
TRIAL_UPDATES = 15
THREADS = (1, 2)
SAMPLES_BAR, SECONDS_BAR = 2.0, 0.5
NO_TRL = "TRL is not installed here: pip install 'flowd[bench]'"

Steps = Sequence[
    Mapping[str, float]
]  # of each update reward_mean, and seconds since the first began


def samples_per_s(steps: Steps, samples: int) -> float:
    """After the warm-in. samples: of one update."""
    seconds = steps[-1]["seconds"] - steps[WARM_IN_UPDATES - 1]["seconds"]
    return (len(steps) - WARM_IN_UPDATES) * samples / seconds


def reward_final(steps: Steps) -> float:
    """Mean of the last updates."""
    return statistics.fmean(step["reward_mean"] for step in steps[-WINDOW:])


def seconds_to(steps: Steps, goal: float) -> float | None:
    """Until the mean of WINDOW updates has it; None when it never does."""
    for end in range(WINDOW, len(steps) + 1):
        if reward_final(steps[:end]) >= goal:
            return steps[end - 1]["seconds"]
    return None


def summarize(flowd: Sequence[Steps], trl: Sequence[Steps], samples: int) -> dict[str, Any]:
    """Medians over the seeds; seconds to the goal are None where a seed did not reach it."""
    result: dict[str, Any] = {}
    for prefix, runs in (("", flowd), ("trl_", trl)):
        seconds = [seconds_to(steps, GOAL) for steps in runs]
        there = [value for value in seconds if value is not None]
        result |= {
            f"{prefix}samples_per_s": statistics.median(samples_per_s(s, samples) for s in runs),
            f"{prefix}reward_final": statistics.median(reward_final(s) for s in runs),
            f"{prefix}seconds_to_0_9": (
                statistics.median(there) if len(there) == len(seconds) else None
            ),
            f"{prefix}seconds_to_0_9_by_seed": seconds,
        }
    result["samples_over_trl"] = result["samples_per_s"] / result["trl_samples_per_s"]
    ours, theirs = result["seconds_to_0_9"], result["trl_seconds_to_0_9"]
    result["seconds_over_trl"] = None if ours is None or theirs is None else ours / theirs
    return result


def reached(result: Mapping[str, Any]) -> bool:
    """Whether the numbers are as they should be on two idle cores."""
    seconds = result["seconds_over_trl"]
    return bool(
        result["samples_over_trl"] >= SAMPLES_BAR and seconds is not None and seconds <= SECONDS_BAR
    )


def warmed_up_model(folder: Path, cache_dir: Path, seed: int) -> None:
    """Write the model that the job begins with as a Hugging Face folder. Its warm-up stays in `cache_dir`, where the
    job finds it."""
    import torch

    from actors.models.loading import build_model, save_pretrained_folder
    from actors.models.text_policy import TextPolicy
    from actors.trainer.warmup import warm_up
    from sim.registry import make

    torch.set_num_threads(1)
    config = load_job(CONFIG, [f"job.seed={seed}"])
    model, tokenizer = build_model(config.model, seed=seed)
    policy = TextPolicy(tokenizer, generation_config=model.generation_config)
    task = make(config.env.task, num_slots=1, args=config.env.args)
    warm_up(model, policy, tokenizer, task, config, cache_dir, lambda **_: None)
    task.close()
    save_pretrained_folder(model, tokenizer, folder)


def run_trl(folder: Path, seed: int, updates: int, threads: int) -> Steps:
    """In a fresh process: torch's thread pools cannot be changed once they were used."""
    words = [str(folder), "--seed", str(seed), "--updates", str(updates), "--threads", str(threads)]
    command = [sys.executable, "-m", "bench.trl_peer", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr[-3000:]}")
    steps: Steps = json.loads(done.stdout)
    return steps


def changes(seed: int, updates: int, ranks: int) -> dict[str, Any]:
    """What differs from the demo's job: it does not stop at a reward."""
    return {
        "job.seed": seed,
        "job.steps": updates,
        "job.stop_reward": 2.0,  # never reached
        "trainer.devices": ranks,
    }


def run_flowd(flowd: Flowd, name: str, seed: int, updates: int, ranks: int) -> Steps:
    """Submit, wait for the end, and read metrics.jsonl."""
    flowd.submit(name, changes(seed, updates, ranks))
    flowd.wait(name)
    lines = flowd.metrics(name)
    began = lines[0]["time"] - lines[0]["seconds"]
    return [{"reward_mean": line["reward_mean"], "seconds": line["time"] - began} for line in lines]


def measure(updates: int, seeds: int, devices: str) -> dict[str, Any]:
    """Trials, then all runs; who comes first changes from seed to seed."""
    load = MachineLoad()
    config = load_job(CONFIG, overrides(changes(0, updates, 1)))
    samples = config.job.groups_per_step * config.rollout.group_size
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as name:
        root = Path(name)
        models = [root / f"model-{seed}" for seed in range(seeds)]
        with Flowd(root / "flowd", devices) as flowd:
            for seed, folder in enumerate(models):
                warmed_up_model(folder, root / "flowd" / "cache", seed)
            trials: dict[str, dict[int, float]] = {"flowd": {}, "trl": {}}
            for threads in THREADS:
                found = run_flowd(flowd, f"trial-{threads}", 0, TRIAL_UPDATES, threads)
                trials["flowd"][threads] = samples_per_s(found, samples)
                found = run_trl(models[0], 0, TRIAL_UPDATES, threads)
                trials["trl"][threads] = samples_per_s(found, samples)
            best = {who: max(rates, key=rates.__getitem__) for who, rates in trials.items()}
            print(f"samples/s by threads: {trials}", file=sys.stderr)
            runs: dict[str, list[Steps]] = {"flowd": [], "trl": []}
            for seed, folder in enumerate(models):
                for who in ("flowd", "trl") if seed % 2 == 0 else ("trl", "flowd"):
                    steps = (
                        run_flowd(flowd, f"seed-{seed}", seed, updates, best["flowd"])
                        if who == "flowd"
                        else run_trl(folder, seed, updates, best["trl"])
                    )
                    runs[who].append(steps)
                    print(
                        f"{who} seed {seed}: {samples_per_s(steps, samples):.0f} samples/s, "
                        f"reward {reward_final(steps):.3f}",
                        file=sys.stderr,
                    )
    facts = surroundings()
    facts["versions"]["trl"] = importlib.metadata.version("trl")
    return {
        **summarize(runs["flowd"], runs["trl"], samples),
        "trainer_ranks": best["flowd"],
        "trl_threads": best["trl"],
        "trial_samples_per_s": trials,
        "updates": updates,
        "samples_per_update": samples,
        "seeds": seeds,
        "config": CONFIG,
        "devices": devices,
        "load": load.report(),
        **facts,
    }


def main() -> int:
    """Exit code 0 when the numbers are as they should be on two idle cores, 1 otherwise; 2 without TRL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--devices", default="cpu:4", help="as in `flowd up`; default: the demo's")
    options = parser.parse_args()
    if options.updates < WARM_IN_UPDATES + WINDOW or options.seeds < 1:
        parser.error(f"at least --updates {WARM_IN_UPDATES + WINDOW} and --seeds 1")
    if importlib.util.find_spec("trl") is None:
        parser.error(NO_TRL)
    result = measure(options.updates, options.seeds, options.devices)
    result["bar_reached"] = reached(result)
    return tell(result, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
