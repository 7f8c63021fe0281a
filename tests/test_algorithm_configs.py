"""The job of every algorithm loads, differs in nothing but the algorithm, and is there."""

from pathlib import Path

import msgspec
import pytest

from actors.algorithms.config import PAPERS
from flowd.devices import inventory
from flowd.job import load_job
from flowd.planner import plan

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted((CONFIGS / "algorithms").glob("*.toml"))

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_every_algorithm_has_a_job_named_after_it() -> None:
    """A file may show a setting of an algorithm too; the name then goes on after it."""
    used = {path.stem: load_job(path).algorithm.name for path in FILES}
    assert set(PAPERS) == set(used.values())
    assert all(stem.startswith(name) for stem, name in used.items())


@every_file
def test_it_compares_with_the_others(path: Path) -> None:
    """Same task, model, sampling, learning rate and warm-up as the job of `make demo`; only the name, the policy lag,
    the algorithm and the rollout devices are its own."""
    config, demo = load_job(path), load_job(CONFIGS / "arithmetic_grpo.toml")
    assert config.job.name == f"arithmetic_{path.stem}"
    job = msgspec.structs.replace(
        demo.job, name=config.job.name, max_staleness=config.job.max_staleness
    )
    rollout = msgspec.structs.replace(demo.rollout, devices=config.rollout.devices)
    same = msgspec.structs.replace(demo, job=job, rollout=rollout, algorithm=config.algorithm)
    assert config == same


@every_file
def test_it_can_be_placed_and_says_what_it_shows(path: Path) -> None:
    """On a machine with four virtual devices; the first lines are sentences."""
    assert plan(load_job(path), inventory("cpu:4")).stage("trainer")
    assert path.read_text().splitlines()[0].startswith("# ")
