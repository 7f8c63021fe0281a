"""`make demo`: from nothing to a trained model. Starts a flowd of its own, runs a job to its end, prints the curve.

Everything it does a user could type; it prints each command. What it started is stopped whatever happens.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flowd.paths import StatePaths

BAR_WIDTH = 50
CURVE_ROWS = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the job is done."""
    parser = argparse.ArgumentParser(prog="python -m flowd.demo", description=__doc__)
    parser.add_argument("job_file", nargs="?", default="configs/arithmetic_grpo.toml")
    parser.add_argument("--state-dir", default=".demo", help="kept, so that a second run is faster")
    parser.add_argument("--devices", default="cpu:4")
    parser.add_argument("--set", action="append", default=[], help="as in `flowctl submit`")
    args = parser.parse_args(argv)
    paths = StatePaths(Path(args.state_dir).resolve())
    job = _free_name(paths, Path(args.job_file).stem)
    where = ["--state-dir", str(paths.root)]
    overrides = [word for one in args.set for word in ("--set", one)]
    if code := _run("flowd", "up", "--detach", "--devices", args.devices, *where):
        return code
    try:
        submit = ["submit", args.job_file, "--follow", "--set", f"job.name={job}", *overrides]
        code = _run("flowctl", *submit, *where)
    except KeyboardInterrupt:
        code = 130
    finally:
        _run("flowd", "down", *where)
    run = paths.run(job)
    if run.metrics.exists():
        print(f"\nReward (share of exact answers) by step, job {job}:\n")
        print(curve(_rewards(run.metrics)))
        print(f"\nEverything about the run is in {run.root}: metrics.jsonl, samples.jsonl, ledger,")
        print(f"checkpoints; `tensorboard --logdir {run.root / 'tensorboard'}` shows the curves.")
    return code


def curve(rewards: Sequence[tuple[int, float]], rows: int = CURVE_ROWS) -> str:
    """(step, reward) pairs as a bar chart of at most `rows` lines; each bar is the mean of its steps."""
    if not rewards:
        return "no step was trained"
    per_row = -(-len(rewards) // rows)
    lines = []
    for start in range(0, len(rewards), per_row):
        chunk = rewards[start : start + per_row]
        mean = sum(reward for _, reward in chunk) / len(chunk)
        bar = "█" * round(max(0.0, min(1.0, mean)) * BAR_WIDTH)
        lines.append(f"{chunk[0][0]:>6}  {mean:5.3f}  {bar}")
    return "\n".join(lines)


def _rewards(metrics: Path) -> list[tuple[int, float]]:
    """The last attempt of every step; one whose reward was no number is left out."""
    by_step: dict[int, float | None] = {}
    for text in metrics.read_text().splitlines():
        line = json.loads(text)
        if "reward_mean" in line:  # else it is an evaluation's
            by_step[int(line["step"])] = line["reward_mean"]
    return sorted((step, reward) for step, reward in by_step.items() if reward is not None)


def _free_name(paths: StatePaths, stem: str) -> str:
    number = 1
    while paths.run(f"{stem}-{number}").root.exists():
        number += 1
    return f"{stem}-{number}"


def _run(program: str, *words: str) -> int:
    """Run one of our two programs with this interpreter, showing what would be typed."""
    print("$", program, *words, file=sys.stderr, flush=True)
    module = {"flowd": "flowd", "flowctl": "flowd.flowctl"}[program]
    return subprocess.run([sys.executable, "-m", module, *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
