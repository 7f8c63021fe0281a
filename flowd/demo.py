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
    job = free_name(paths, Path(args.job_file).stem)
    code = train(paths, args.devices, args.job_file, [f"job.name={job}", *args.set])
    run = paths.run(job)
    if run.metrics.exists():
        print(f"\nReward (share of exact answers) by step, job {job}:\n")
        print(curve(by_step(run.metrics, "reward_mean")))
        print(f"\nEverything about the run is in {run.root}: metrics.jsonl, samples.jsonl, ledger,")
        print(f"checkpoints; `tensorboard --logdir {run.root / 'tensorboard'}` shows the curves.")
    return code


def train(paths: StatePaths, devices: str, job_file: str, overrides: Sequence[str]) -> int:
    """Run a job to its end on a flowd that is started for it and stopped whatever happens; the exit code."""
    where = ["--state-dir", str(paths.root)]
    words = [word for one in overrides for word in ("--set", one)]
    if code := _run("flowd", "up", "--detach", "--devices", devices, *where):
        return code
    try:
        return _run("flowctl", "submit", job_file, "--follow", *words, *where)
    except KeyboardInterrupt:
        return 130
    finally:
        _run("flowd", "down", *where)


def curve(values: Sequence[tuple[int, float]], rows: int = CURVE_ROWS) -> str:
    """(step, share) pairs as a bar chart of at most `rows` lines; each bar is the mean of its steps."""
    if not values:
        return "no step was trained"
    per_row = -(-len(values) // rows)
    lines = []
    for start in range(0, len(values), per_row):
        chunk = values[start : start + per_row]
        mean = sum(value for _, value in chunk) / len(chunk)
        bar = "█" * round(max(0.0, min(1.0, mean)) * BAR_WIDTH)
        lines.append(f"{chunk[0][0]:>6}  {mean:5.3f}  {bar}")
    return "\n".join(lines)


def by_step(metrics: Path, key: str) -> list[tuple[int, float]]:
    """A number of the lines that have it, of the last attempt of every step; one that is no number is left out."""
    found: dict[int, float | None] = {}
    for text in metrics.read_text().splitlines():
        line = json.loads(text)
        if key in line:  # steps and evaluations have lines of their own
            found[int(line["step"])] = line[key]
    return sorted((step, value) for step, value in found.items() if value is not None)


def free_name(paths: StatePaths, stem: str) -> str:
    """A name of a job that no run has: STEM-1, STEM-2, …"""
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
