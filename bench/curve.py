"""Draws the reward curves of runs as a picture, for the README.

python -m bench.curve RUN_DIR [RUN_DIR …] -o docs/arithmetic.png
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

WINDOW = 5


def read(run_dir: Path) -> tuple[list[float], list[float], float, list[tuple[float, float]]]:
    """Seconds since the run began, rewards (mean of up to WINDOW steps), seconds before the first step, and of each
    evaluation its seconds and mean reward.
    """
    began = (run_dir / "job.toml").stat().st_mtime
    every = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in every if "reward_mean" in line]
    evaluations = [
        (line["time"] - began, line["eval_reward_mean"])
        for line in every
        if "eval_reward_mean" in line
    ]
    rewards = [line["reward_mean"] for line in lines]
    smooth = [
        sum(rewards[max(0, i - WINDOW + 1) : i + 1]) / len(rewards[max(0, i - WINDOW + 1) : i + 1])
        for i in range(len(rewards))
    ]
    seconds = [line["time"] - began for line in lines]
    return seconds, smooth, seconds[0], evaluations


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7.5, 4), dpi=120)
    for seed, run in enumerate(args.runs):
        seconds, rewards, first, evaluations = read(run)
        (line,) = axes.plot(seconds, rewards, label=f"seed {seed}")
        if evaluations:
            axes.plot(*zip(*evaluations, strict=True), "o", color=line.get_color(), markersize=4)
        axes.axvspan(0, first, color=line.get_color(), alpha=0.06)
    axes.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("seconds since submit (shaded: supervised warm-up)")
    axes.set_ylabel("reward: share of exact answers")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.legend(loc="lower right")
    axes.set_title("GRPO on four-digit sums, 2 CPU cores")
    figure.tight_layout()
    figure.savefig(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
