"""The runs that compare the algorithms: which there are, how one is carried out, and what is kept of it."""

import dataclasses
import hashlib
import json
import os
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.local import Flowd, MachineLoad, overrides, surroundings
from flowd.control import ENDED
from flowd.job import load_job

CONFIGS = Path("configs/algorithms")
REPEATED = ("ppo", "grpo", "dapo", "reinforce_pp", "grpo_async")
REPEATED_SEEDS = (0, 1, 2)

MANY_UPDATES = {  # so that ratios leave 1 and clipping matters; groups are not filtered, which costs entropy too
    "algorithm.epochs": 2,
    "algorithm.mini_batches": 4,
    "algorithm.dynamic_sampling": False,
    "job.steps": 60,
}
FROZEN = {  # the warmed-up policy, whose gradient is measured again and again: 1e-12 changes no float32 weight
    "trainer.learning_rate": 1e-12,
    "job.max_staleness": 0,
    "job.stop_reward": 2.0,  # never reached
    "algorithm.overlong_max_tokens": 1,  # every answer is overlong: rewards are -1 and 0, which a baseline makes up for
}
NOISE_BATCHES = {4: 120, 64: 40}  # groups in a step: steps
NOISE_OF: dict[tuple[str, str], dict[str, Any]] = {
    ("grpo", "frozen"): {},
    ("rloo", "frozen"): {},
    ("reinforce_pp", "frozen"): {},
    ("reinforce_pp_baseline", "frozen"): {},
    ("reinforce_pp", "frozen-no-baseline"): {"algorithm.normalization": "none"},
}
# What one algorithm is compared with beyond the others' own jobs: its job with changes.
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("grpo", "on-policy"): {"job.max_staleness": 0},
    ("dapo", "clip-higher"): {**MANY_UPDATES, "algorithm.clip_high": 0.28},
    ("dapo", "clip-symmetric"): {**MANY_UPDATES, "algorithm.clip_high": 0.2},
    ("grpo", "many-updates"): MANY_UPDATES,
    ("cispo", "many-updates"): MANY_UPDATES,
    ("reinforce_pp", "one-sample"): {
        "rollout.group_size": 1,
        "job.groups_per_step": 256,
        "job.stop_reward": 0.9,
    },
    ("ppo", "stale"): {"job.max_staleness": 4},
    ("decoupled_ppo", "stale"): {"job.max_staleness": 4},
    **{
        (name, f"{what}-{batch}"): {
            **FROZEN,
            **changes,
            "job.groups_per_step": batch,
            "job.steps": steps,
        }
        for (name, what), changes in NOISE_OF.items()
        for batch, steps in NOISE_BATCHES.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One job: that of a file in configs/algorithms, or a variant of it, with a seed."""

    algorithm: str
    seed: int = 0
    variant: str = ""

    @property
    def label(self) -> str:
        """What runs that differ in nothing but the seed are called."""
        return f"{self.algorithm}/{self.variant}" if self.variant else self.algorithm

    @property
    def config(self) -> str:
        """Its job file."""
        return str(CONFIGS / f"{self.algorithm}.toml")

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the job file."""
        variant = VARIANTS[self.algorithm, self.variant] if self.variant else {}
        return {"job.seed": self.seed, **variant}

    def key(self) -> str:
        """A hash of what the job file says and of the changes: comments and defaults of the code are no part of it."""
        document = tomllib.loads(Path(self.config).read_text())
        what = json.dumps([document, self.changes], sort_keys=True)
        return hashlib.sha256(what.encode()).hexdigest()[:16]


def planned(names: Sequence[str], seeds: int | None, variants: bool = True) -> list[Run]:
    """All runs of these algorithms, first seeds first; the variants come last.

    seeds: of every algorithm; None is three of those in REPEATED and one of the others
    """
    every = max(seeds or 0, len(REPEATED_SEEDS))
    runs = [
        Run(name, seed)
        for seed in range(every)
        for name in names
        if seed < (seeds or (len(REPEATED_SEEDS) if name in REPEATED else 1))
    ]
    if variants:
        runs += [Run(name, 0, variant) for name, variant in VARIANTS if name in names]
    return runs


@dataclasses.dataclass(frozen=True)
class Record:
    """What is kept of a finished run. steps: the numbers of each line of metrics.jsonl, the last attempt's."""

    label: str
    seed: int
    key: str
    reason: str
    seconds: float
    steps: list[dict[str, float]]
    group_size: int
    load: dict[str, float]
    surroundings: dict[str, Any]


class Results:
    """Finished runs in a file of JSON lines. A line that a crash cut off counts as a run that did not finish."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_key: dict[str, Record] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self._by_key[record.key] = record

    def find(self, run: Run) -> Record | None:
        """The record of an equal run."""
        return self._by_key.get(run.key())

    def by_label(self) -> dict[str, list[Record]]:
        """Records of jobs as they are now, in order of seeds; not those of job files that have changed since."""
        found: dict[str, list[Record]] = {}
        for record in sorted(self._by_key.values(), key=lambda record: record.seed):
            algorithm, _, variant = record.label.partition("/")
            known = not variant or (algorithm, variant) in VARIANTS
            run = Run(algorithm, record.seed, variant)
            if known and Path(run.config).exists() and run.key() == record.key:
                found.setdefault(record.label, []).append(record)
        return found

    def add(self, record: Record) -> None:
        """Keep it; on disk when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(dataclasses.asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._by_key[record.key] = record


def execute(flowd: Flowd, run: Run) -> Record:
    """Carry a run out from its beginning. RuntimeError when its job fails."""
    began, load = time.monotonic(), MachineLoad()
    name = _free_name(flowd.root, f"{run.label}-s{run.seed}".replace("/", "-"))
    flowd.submit(name, run.changes, run.config)
    flowd.wait(name)
    return Record(
        label=run.label,
        seed=run.seed,
        key=run.key(),
        reason=str(flowd.status(name).get("reason") or ""),
        seconds=round(time.monotonic() - began, 1),
        steps=numbers(flowd.metrics(name)),
        group_size=load_job(run.config, overrides(run.changes)).rollout.group_size,
        load=load.report(),
        surroundings=surroundings(),
    )


def numbers(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Of each trained step the last attempt's numbers, in order of steps."""
    by_step = {
        line["step"]: {
            key: value
            for key, value in line.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for line in lines
        if "reward_mean" in line
    }
    return [by_step[step] for step in sorted(by_step)]


def cancel_leftovers(flowd: Flowd) -> None:
    """End jobs that still run from a time when this was killed."""
    for job in json.loads(flowd.call("flowctl", "jobs", "--json")):
        if job["state"] not in ENDED:
            flowd.call("flowctl", "cancel", job["name"])


def _free_name(root: Path, stem: str) -> str:
    number = 1
    while (root / "runs" / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"
