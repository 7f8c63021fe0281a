"""What does the spine cost, and what does streaming gain? The demo's job three ways, in groups per second.

    python -m bench.spine --json

sequential: a plain loop in one process over the same components (task, policy, engines), one big batch a step
sync, async: a real flowd and job with max_staleness = 0 and 1, from metrics.jsonl after a warm-in

All of them train the same number of groups from random weights, without warm-up, and commit as often. Each round
runs all of them, in rotated order, and rates are medians over rounds. Each way may use two cores as suits it best: the
loop runs with 1 and with 2 torch threads, the jobs with 1 and with 2 devices for rollout and as many for the trainer,
a thread each; the faster counts.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.local import CONFIG, Flowd, MachineLoad, surroundings, tell

WARM_IN_STEPS = 5  # first kernels, caches, the pipeline fills
SEQUENTIAL_THREADS = (1, 2)
STALENESS = {"sync": 0, "async": 1}
DEVICES = (1, 2)  # of each stage
CONTROL = ("daemon", "zygote", "conductor")
ASYNC_BAR, SYNC_BAR, CONTROL_BAR = 1.3, 0.9, 0.05


def changes(steps: int, staleness: int, devices: int = 1) -> dict[str, Any]:
    """What differs from the demo's job: a fixed number of groups, from random weights, and the plan."""
    return {
        "rollout.devices": devices,
        "trainer.devices": devices,
        "job.steps": steps,
        "job.max_staleness": staleness,
        "job.stop_reward": 2.0,  # never reached
        "warmup.steps": 0,
        "guards.constant_reward_steps": 0,  # random weights get no answer right
    }


def rotated(ways: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: each way comes first, second, … equally often."""
    start = number % len(ways)
    return [*ways[start:], *ways[:start]]


def summarize(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians of groups per second, and their ratios. A way is named "kind_number"; its best number counts."""
    medians = {way: statistics.median(values) for way, values in rates.items()}
    best = {
        kind: max((way for way in medians if way.startswith(kind)), key=medians.__getitem__)
        for kind in ("sequential", *STALENESS)
    }
    sequential = medians[best["sequential"]]
    return {
        **{f"{kind}_groups_per_s": medians[way] for kind, way in best.items()},
        **{f"{kind}_over_sequential": medians[best[kind]] / sequential for kind in STALENESS},
        "best": best,
        "groups_per_s": medians,
        "rounds": {way: [round(value, 2) for value in values] for way, values in rates.items()},
    }


def control_fraction(seconds: Mapping[str, float]) -> float:
    """CPU time of daemon, zygote and conductor over that of all; seconds: by "daemon", "zygote", or kind of actor."""
    return sum(seconds.get(name, 0.0) for name in CONTROL) / sum(seconds.values())


def reached(result: Mapping[str, Any]) -> bool:
    """Whether the numbers are as they should be on two idle cores."""
    return bool(
        result["async_over_sequential"] >= ASYNC_BAR
        and result["sync_over_sequential"] >= SYNC_BAR
        and result["control_overhead_fraction"] < CONTROL_BAR
    )


# The plain loop, in a process of its own.


def sequential(steps: int, threads: int) -> dict[str, float]:
    """Sample a step's groups as one batch, train on them, hand the weights over, again and again."""
    import numpy as np
    import torch

    from actors.algorithms import registry
    from actors.backends.contract import GenerationRequest
    from actors.backends.hf_engine import HFGenerationEngine
    from actors.backends.hf_trainer import HFTrainingEngine
    from actors.conductor.manifest import Manifest
    from actors.episodes import Action, Group, Sampling, Segment, Turn
    from actors.models.loading import build_model
    from actors.models.text_policy import TextPolicy
    from actors.randomness import fold
    from actors.trainer.checkpoint import CheckpointWriter
    from flowd.job import load_job
    from sim.registry import make

    torch.set_num_threads(threads)
    config = load_job(CONFIG, [f"{key}={value}" for key, value in changes(steps, 0).items()])
    num_groups, group_size = config.job.groups_per_step, config.rollout.group_size
    slots = range(num_groups * group_size)
    task = make(config.env.task, num_slots=len(slots), args=config.env.args)
    model, tokenizer = build_model(config.model, seed=config.job.seed, dtype=torch.float32)
    trainer = HFTrainingEngine(
        model,
        algorithm=registry.find(config.algorithm.name),
        algorithm_config=config.algorithm,
        config=config.trainer,
    )
    sampled_model, _ = build_model(config.model, seed=config.job.seed, dtype=torch.float32)
    policy = TextPolicy(tokenizer, generation_config=sampled_model.generation_config)
    engine = HFGenerationEngine(
        sampled_model,
        max_running=len(slots),
        max_context_tokens=config.rollout.max_context_tokens,
        pad_token=tokenizer.pad_token_id,
    )
    sampling = Sampling(temperature=config.rollout.temperature, top_k=config.rollout.top_k)
    nothing = np.zeros(0, dtype=np.int32)

    def sample(step: int) -> list[Group]:
        first = step * num_groups
        seeds = [fold(config.job.seed, 1, first + slot // group_size) >> 1 for slot in slots]
        observations = task.reset(slots, seeds)
        prompts = [policy.encode(nothing, observation) for observation in observations]
        for slot in slots:
            engine.add(
                GenerationRequest(
                    request_id=slot,
                    context=prompts[slot],
                    max_new_tokens=config.rollout.max_new_tokens,
                    key=fold(config.job.seed, 2, step, slot),
                    sampling=sampling,
                    stop_tokens=policy.stop_tokens,
                )
            )
        ended = {}
        while engine.num_running:
            ended.update({generation.request_id: generation for generation in engine.step()})
        texts = [policy.decode(ended[slot].tokens) for slot in slots]
        results = task.step(slots, texts)
        segments = [
            Segment(
                sample=slot % group_size,
                turns=(
                    Turn(
                        observation=observations[slot],
                        action=Action(
                            prompt=prompts[slot],
                            tokens=ended[slot].tokens,
                            logprobs=ended[slot].logprobs,
                            versions=ended[slot].versions,
                            mask=np.ones(len(ended[slot].tokens), dtype=np.bool_),
                            text=texts[slot],
                            finish=ended[slot].finish,
                            sampling=sampling,
                        ),
                        reward=results[slot].reward,
                    ),
                ),
            )
            for slot in slots
        ]
        return [
            Group(
                group=first + group,
                attempt=0,
                run_attempt=0,
                seed=seeds[group * group_size],
                segments=tuple(segments[group * group_size : (group + 1) * group_size]),
            )
            for group in range(num_groups)
        ]

    with tempfile.TemporaryDirectory(prefix="bench-spine-") as folder:
        writer = CheckpointWriter(Path(folder), config.checkpoint)
        spent = {"sample": 0.0, "train": 0.0, "commit": 0.0}
        for step in range(steps):
            if step == WARM_IN_STEPS:
                began, cpu_began = time.perf_counter(), _own_cpu_s()
                spent = dict.fromkeys(spent, 0.0)
            start = time.perf_counter()
            engine.load_weights(step, dict(trainer.weights()))
            groups = sample(step)
            sampled = time.perf_counter()
            trainer.begin_step()
            trainer.accumulate(groups)
            trainer.finish_step()
            trained = time.perf_counter()
            if (step + 1) % config.checkpoint.every_steps == 0:
                manifest = Manifest(step=step + 1, policy_version=step + 1, run_attempt=0)
                writer.stage(manifest.step, trainer.state())
                writer.write()
                writer.commit(manifest)
            spent["sample"] += sampled - start
            spent["train"] += trained - sampled
            spent["commit"] += time.perf_counter() - trained
        seconds = time.perf_counter() - began
    measured = steps - WARM_IN_STEPS
    return {
        "groups_per_s": measured * num_groups / seconds,
        "cpu_s_per_step": (_own_cpu_s() - cpu_began) / measured,
        **{f"{name}_ms": value / measured * 1e3 for name, value in spent.items()},
    }


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_sequential(steps: int, threads: int) -> dict[str, float]:
    """The loop in a fresh process: torch's thread pools cannot be changed once they were used."""
    command = [sys.executable, "-m", "bench.spine", "--loop", str(threads), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


# Through flowd.


@dataclasses.dataclass
class JobFigures:
    """Of one job: its rate, and CPU seconds a step by "daemon", "zygote" and kind of actor."""

    groups_per_s: float
    cpu_s_per_step: dict[str, float]
    stages: dict[str, float]


def run_job(flowd: Flowd, name: str, steps: int, staleness: int, devices: int) -> JobFigures:
    """Submit, measure from the warm-in to the end, wait until all of it is gone."""
    flowd.submit(name, changes(steps, staleness, devices))
    flowd.wait_step(name, WARM_IN_STEPS)
    processes = _processes(flowd, name)
    first, before = len(flowd.metrics(name)), _cpu_seconds(processes)
    flowd.wait_step(name, steps - 1)
    last, after = len(flowd.metrics(name)), _cpu_seconds(processes)
    flowd.wait(name)
    lines = flowd.metrics(name)
    measured = lines[WARM_IN_STEPS:]
    groups = sum(line["groups"] for line in measured)
    stages = {k for line in measured for k in line if k.startswith("seconds") or k.endswith("_s")}
    return JobFigures(
        groups_per_s=groups / (measured[-1]["time"] - lines[WARM_IN_STEPS - 1]["time"]),
        cpu_s_per_step={kind: (after[kind] - before[kind]) / (last - first) for kind in before},
        stages={
            key: statistics.median(line[key] for line in measured if key in line) for key in stages
        },
    )


def _processes(flowd: Flowd, name: str) -> list[tuple[str, psutil.Process]]:
    daemon = psutil.Process(json.loads(flowd.call("flowctl", "nodes", "--json"))[0]["pid"])
    actors = flowd.status(name)["actors"]
    pids = {actor["pid"]: actor["kind"] for actor in actors}
    # The zygote is the daemon's child and the actors' parent.
    zygotes = [child for child in daemon.children(recursive=True) if child.pid not in pids]
    return [
        ("daemon", daemon),
        *(("zygote", process) for process in zygotes),
        *((kind, psutil.Process(pid)) for pid, kind in pids.items()),
    ]


def _cpu_seconds(processes: Sequence[tuple[str, psutil.Process]]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for kind, process in processes:
        times = process.cpu_times()
        seconds[kind] = seconds.get(kind, 0.0) + times.user + times.system
    return seconds


def measure(steps: int, rounds: int, devices: str) -> dict[str, Any]:
    """All rounds; the order rotates, so that a change of the machine's load meets all ways alike."""
    load = MachineLoad()
    loops = {f"sequential_{threads}": threads for threads in SEQUENTIAL_THREADS}
    jobs = {f"{kind}_{number}": (kind, number) for kind in STALENESS for number in DEVICES}
    ways = [*loops, *jobs]
    rates: dict[str, list[float]] = {way: [] for way in ways}
    details: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    stages: dict[str, list[dict[str, float]]] = {way: [] for way in jobs}
    with tempfile.TemporaryDirectory(prefix="bench-spine-") as root:
        with Flowd(Path(root), devices) as flowd:
            for number in range(rounds):
                for way in rotated(ways, number):
                    if way in loops:
                        figures = run_sequential(steps, loops[way])
                        rates[way].append(figures.pop("groups_per_s"))
                        details[way].append(figures)
                    else:
                        kind, each = jobs[way]
                        name = f"{way}-{number}".replace("_", "-")
                        job = run_job(flowd, name, steps, STALENESS[kind], each)
                        rates[way].append(job.groups_per_s)
                        details[way].append(job.cpu_s_per_step)
                        stages[way].append(job.stages)
                    print(f"round {number} {way}: {rates[way][-1]:.1f} groups/s", file=sys.stderr)
    result = summarize(rates)
    fractions = {
        way: statistics.median(control_fraction(each) for each in details[way]) for way in jobs
    }
    return {
        **result,
        "control_overhead_fraction": max(fractions[result["best"][kind]] for kind in STALENESS),
        "control_overhead_fraction_by_way": fractions,
        "cpu_s_per_step": {way: _medians(details[way]) for way in jobs},
        "sequential_details": {way: _medians(details[way]) for way in loops},
        "stages": {way: _medians(stages[way]) for way in jobs},
        "steps": steps,
        "warm_in_steps": WARM_IN_STEPS,
        "config": CONFIG,
        "devices": devices,
        "load": load.report(),
        **surroundings(),
    }


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = sorted({key for row in rows for key in row})
    return {
        key: round(statistics.median(row[key] for row in rows if key in row), 5) for key in keys
    }


def main() -> int:
    """Exit code 0 when the numbers are as they should be on two idle cores, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--steps", type=int, default=60, help="trainer steps of each run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--devices", default="cpu:4", help="as in `flowd up`; default: the demo's")
    parser.add_argument("--loop", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < WARM_IN_STEPS + 10 or options.rounds < 1:
        parser.error(f"at least --steps {WARM_IN_STEPS + 10} and --rounds 1")
    if options.loop:
        print(json.dumps(sequential(options.steps, options.loop)))
        return 0
    result = measure(options.steps, options.rounds, options.devices)
    result["bar_reached"] = reached(result)
    return tell(result, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
