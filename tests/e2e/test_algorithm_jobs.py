"""Every job of configs/algorithms, whole: real actors train a few steps with each algorithm's own settings."""

import math
from pathlib import Path

import pytest
from flowd_process import Flowd

from flowd.job import dump_job, load_job

STEPS = 5
GROUPS = 32
FILES = sorted((Path(__file__).parents[2] / "configs" / "algorithms").glob("*.toml"))
# A task that a policy without a warm-up solves half of the time.
CHANGES = ("env.task=e2e_tasks:Parity", "warmup.steps=0", f"job.steps={STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_job_trains(flowd: Flowd, path: Path) -> None:
    """All numbers are finite, the policy moves, the ledger is sound; with dynamic sampling every group teaches."""
    config = load_job(path, CHANGES)
    name = config.job.name
    flowd.request("submit", toml=dump_job(config), source=str(path))
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS, groups_per_step=GROUPS)
    for line in lines:
        numbers = [value for value in line.values() if isinstance(value, int | float)]
        assert all(map(math.isfinite, numbers)), line
        assert line["grad_norm"] > 0
        assert line["staleness_max"] <= config.job.max_staleness
        assert 0.0 < line["reward_mean"] < 1.0
    if config.algorithm.name == "dapo":
        assert all(line["useful_share"] == 1.0 for line in lines)
        assert any(line["filtered_share"] > 0 for line in lines)
