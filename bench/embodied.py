"""How fast do robots learn? One task four ways, in environment steps per second, simulation and training included.

    python -m bench.embodied --json [--python .venv-robots/bin/python]

loop: one process over our parts: all environments are stepped, one batch of actions is inferred, then it trains
sb3: stable-baselines3's PPO with SubprocVecEnv, the same numbers
flowd: a real flowd and job, collocated and strictly on-policy
flowd_pipelined: disaggregated with max_staleness = 1, so that two env actors simulate while the trainer trains

All play the same environment with the policy and numbers of configs/metaworld_drawer_ppo.toml for as many steps, and
their final success stands beside. Each round runs all of them, in rotated order; rates are medians over rounds.
`step_latency_us_p50`: an observation of 50 KB sent, its action back, without inference (bench.embodied_echo).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from actors.job_config import JobConfig
from bench.embodied_ways import LAST_STEPS, WAYS, run_way
from bench.local import Flowd, MachineLoad, overrides, surroundings, tell
from bench.spine import rotated
from flowd.job import load_job

CONFIG = "configs/metaworld_drawer_ppo.toml"
ECHO = """[job]
name = "echo"
steps = 0
[env]
task = "bench.embodied_echo:Echo"
actors = 1
groups_per_actor = 1
[policy]
kind = "bench.embodied_echo:still"
observation = { state = [12500] }
action = 7
[rollout]
devices = 1
group_size = 1
[eval]
problems = 5
k = 0
record = 0
"""
WARM_IN_STEPS = 2
JOBS: dict[str, dict[str, Any]] = {
    "flowd": {"job.mode": "collocated", "job.max_staleness": 0},
    # Room for the next step's episodes beside those of this one.
    "flowd_pipelined": {
        "job.mode": "disaggregated",
        "job.max_staleness": 1,
        "env.groups_per_actor": 16,
    },
}
OVER_LOOP, OVER_SB3, ON_POLICY_OVER_SB3, LATENCY_US = 1.5, 1.2, 1.0, 1000.0


def changes(steps: int, python: str) -> dict[str, Any]:
    """What differs from the shipped job: its length, and nothing beside training."""
    return {
        "job.steps": steps,
        "eval.every_steps": 0,
        "env.python": python,
        "metrics.samples_per_step": 0,
        "metrics.tensorboard": False,
        "checkpoint.every_steps": steps,
    }


def summarize(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians of each way that was not skipped, as the bench's keys, and the ratios that there are bars for."""
    result: dict[str, Any] = {}
    for way, found in rounds.items():
        if skipped := next((one["skipped"] for one in found if "skipped" in one), None):
            result[f"{way}_steps_per_s"] = None
            result[f"{way}_skipped"] = skipped
            continue
        for key in ("steps_per_s", "success_at_end"):
            result[f"{way}_{key}"] = statistics.median(one[key] for one in found)
    for way in JOBS:
        for base in WAYS:
            rate = result[f"{base}_steps_per_s"]
            if rate is not None:
                result[f"{way}_over_{base}"] = result[f"{way}_steps_per_s"] / rate
    return result


def reached(result: Mapping[str, Any]) -> bool:
    """Whether the numbers are as they should be on two idle cores; what was skipped cannot fail."""
    return bool(
        result["flowd_pipelined_over_loop"] >= OVER_LOOP
        and result.get("flowd_pipelined_over_sb3", OVER_SB3) >= OVER_SB3
        and result.get("flowd_over_sb3", ON_POLICY_OVER_SB3) >= ON_POLICY_OVER_SB3
        and result["step_latency_us_p50"] <= LATENCY_US
    )


def run_process(way: str, python: str, job: Path, steps: int) -> dict[str, Any]:
    """The loop or stable-baselines3, in the simulators' interpreter."""
    command = [
        python,
        "-m",
        "bench.embodied",
        "--way",
        way,
        "--job",
        str(job),
        "--steps",
        str(steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # simulators print too
    return found


def run_job(
    flowd: Flowd, name: str, steps: int, python: str, plan: dict[str, Any]
) -> dict[str, Any]:
    """A job on flowd, measured from the end of the warm-in to its end."""
    flowd.submit(name, changes(steps, python) | plan, CONFIG)
    flowd.wait(name)
    lines = flowd.metrics(name)
    measured = lines[WARM_IN_STEPS:]
    seconds = measured[-1]["time"] - lines[WARM_IN_STEPS - 1]["time"]
    last = [line["info_success_at_end"] for line in lines[-LAST_STEPS:]]
    return {
        "steps_per_s": sum(line["tokens"] for line in measured) / seconds,
        "success_at_end": statistics.mean(last),
    }


def latency(flowd: Flowd, folder: Path) -> dict[str, float]:
    """Of an environment step by way of env actor, rollout actor and back."""
    file = folder / "echo.toml"
    file.write_text(ECHO)
    flowd.submit("echo", {}, str(file))
    flowd.wait("echo")
    (line,) = flowd.metrics("echo")
    return {f"step_latency_us_p{p}": line[f"eval_info_latency_us_p{p}"] for p in (50, 90, 99)}


def measure(steps: int, rounds: int, python: str) -> dict[str, Any]:
    """All rounds; the order rotates, so that a change of the machine's load meets all ways alike."""
    load = MachineLoad()
    ways = [*WAYS, *JOBS]
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    config: JobConfig = load_job(Path(CONFIG), overrides(changes(steps, python)))
    with tempfile.TemporaryDirectory(prefix="bench-embodied-") as folder:
        job = Path(folder) / "job.json"
        job.write_bytes(msgspec.json.encode(config))
        with Flowd(Path(folder) / "state", "cpu:2") as flowd:
            latencies = latency(flowd, Path(folder))
            for number in range(rounds):
                for way in rotated(ways, number):
                    if way in JOBS:
                        name = f"{way}-{number}".replace("_", "-")
                        one = run_job(flowd, name, steps, python, JOBS[way])
                    else:
                        one = run_process(way, python, job, steps)
                    found[way].append(one)
                    print(f"round {number} {way}: {one}", file=sys.stderr)
    return {
        **summarize(found),
        **latencies,
        "rounds": found,
        "steps": steps,
        "warm_in_steps": WARM_IN_STEPS,
        "config": CONFIG,
        "load": load.report(),
        **surroundings(),
    }


def main() -> int:
    """Measure and print; exit code 1 where a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("--steps", type=int, default=32, help="trainer steps of each way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=".venv-robots/bin/python", help="has Meta-World")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= WARM_IN_STEPS:
        parser.error(f"--steps {args.steps}: more than the warm-in of {WARM_IN_STEPS}")
    if args.way is not None:
        config = msgspec.json.decode(args.job.read_bytes(), type=JobConfig)
        print(json.dumps(run_way(args.way, config, args.steps, WARM_IN_STEPS)))
        return 0
    result = measure(args.steps, args.rounds, str(Path(args.python).absolute()))
    result["bar_reached"] = reached(result)
    return tell(result, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
