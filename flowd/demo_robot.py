"""`make demo-robot`: from nothing to a robot that closes a drawer: its success curve, and a film of before and after.

The job trains and evaluates itself as its file says; here it is told to film evaluations, and what it leaves is made
into a picture and a video in its run directory.
"""

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from flowd.demo import by_step, curve, free_name, train
from flowd.job import load_job
from flowd.paths import RunPaths, StatePaths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when the job is done."""
    parser = argparse.ArgumentParser(prog="python -m flowd.demo_robot", description=__doc__)
    parser.add_argument("job_file", nargs="?", default="configs/metaworld_drawer_ppo.toml")
    parser.add_argument("--state-dir", default=".demo")
    parser.add_argument("--devices", default="cpu:2")
    parser.add_argument("--set", action="append", default=[], help="as in `flowctl submit`")
    args = parser.parse_args(argv)
    paths = StatePaths(Path(args.state_dir).resolve())
    job = free_name(paths, Path(args.job_file).stem)
    config = load_job(Path(args.job_file), args.set)
    python = config.env.python or sys.executable
    films = int(_can_draw(python))
    filmed = [f"eval.videos={films}", f"eval.every_steps={config.job.steps}"]  # drawing is slow
    code = train(paths, args.devices, args.job_file, [f"job.name={job}", *filmed, *args.set])
    run = paths.run(job)
    if run.metrics.exists():
        _show(run, python)
    return code


def _show(run: RunPaths, python: str) -> None:
    """Print the curve, and write the picture and the video as far as their packages are here."""
    success = tomllib.loads(run.job_toml.read_text())["eval"]["success"]
    trained = by_step(run.metrics, f"info_{success}")
    evaluated = by_step(run.metrics, f"eval_info_{success}")
    print(f"\n{success} of training episodes by step, job {run.root.name}:\n")
    print(curve(trained))
    for step, rate in evaluated:
        print(f"greedy, fixed starts, after {step} steps: {rate:.2f}")
    made = [_draw(run.root / "success.png", success, trained, evaluated)]
    films = sorted((run.root / "videos").glob("step-*/problem-0-greedy.mp4"))
    if len(films) > 1:
        film = run.root / "before_after.mp4"
        command = [python, "-m", "actors.env.video", str(films[0]), str(films[-1]), str(film)]
        if subprocess.run(command, check=False).returncode == 0:
            made.append(film)
    print(f"\nEverything about the run is in {run.root}:")
    for path in made:
        if path is not None:
            print(path)


def _draw(
    path: Path,
    success: str,
    trained: Sequence[tuple[int, float]],
    evaluated: Sequence[tuple[int, float]],
) -> Path | None:
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        print("(no picture of it: pip install matplotlib)", file=sys.stderr)
        return None
    figure, axes = plt.subplots(figsize=(7.5, 4), dpi=110)
    axes.plot(*zip(*trained, strict=True), label="training episodes")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o", label="greedy, fixed starts")
    axes.set_xlabel("trainer steps")
    axes.set_ylabel(success)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


def _can_draw(python: str) -> bool:
    """Whether MuJoCo can draw here; if not, nothing is filmed, and the command that helps was said."""
    done = subprocess.run(
        [python, "-m", "sim.drivers"], capture_output=True, text=True, check=False
    )
    can = "libosmesa6" not in done.stderr
    if not can:
        print(f"no film: {done.stderr.strip()}", file=sys.stderr)
    return can


if __name__ == "__main__":
    sys.exit(main())
