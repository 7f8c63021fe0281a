"""deterministic = true: the same steps bit for bit, wherever the job runs and whatever dies on the way."""

from typing import Any

import pytest
from flowd_process import FAST, Flowd, kill

STEPS = 40
SAME = ("step", "group_ids", "reward_mean", "loss", "grad_norm", "entropy", "tokens")
# Rewards that differ within groups: otherwise every loss would be zero, and so equal.
CHANGES = (
    f"job.steps={STEPS}",
    "job.deterministic=true",
    "env.task=e2e_tasks:Parity",
    "job.seed=7",
)


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in SAME} for line in lines]


def undisturbed(flowd: Flowd, bound: int, *changes: str) -> list[dict[str, Any]]:
    """The lines of a job that nothing happens to; run once for each set of changes."""
    name = "-".join(["calm", str(bound), *(c.partition("=")[0] for c in changes)])
    if not flowd.run(name).root.exists():
        flowd.submit(name, *CHANGES, f"job.max_staleness={bound}", *changes)
        flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS)
    assert sum(line["loss"] != 0.0 for line in lines) > STEPS // 2
    return numbers(lines)


# Of four answers about half are right: five of eight groups are sampled again.
FILTERED = ("algorithm.dynamic_sampling=true", "algorithm.filter_range=[0.4, 0.6]")


@pytest.mark.parametrize(
    ("bound", "changes"), [(0, ()), (1, ()), (1, FILTERED)], ids=["0", "1", "1-filtered"]
)
def test_killed_trainer_changes_no_number(
    flowd: Flowd, bound: int, changes: tuple[str, ...]
) -> None:
    """What is sampled and trained again after a rollback is what it was, and so is what is filtered out."""
    calm = undisturbed(flowd, bound, *changes)
    name = f"killed-deterministic-{bound}{'-filtered' * bool(changes)}"
    flowd.submit(name, *CHANGES, f"job.max_staleness={bound}", *changes)
    flowd.wait_step(name, 8)
    kill(flowd.pid_of(name, "trainer-0"))
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS)
    assert lines[-1]["attempt"] == 1
    assert numbers(lines) == calm
    if changes:
        assert all(line["useful_share"] == 1.0 and line["filtered_share"] > 0 for line in lines)


def test_flowd_and_actors_gone_then_resumed_changes_no_number(
    flowd: Flowd, own_flowd: Flowd
) -> None:
    """kill -9 of flowd, the actors leave after their grace, and the next flowd resumes from the last commit."""
    own_flowd.up("--orphan-grace-s", "1")
    bounds = {f"lost-{bound}": bound for bound in (0, 1)}
    for name, bound in bounds.items():
        own_flowd.submit(name, *CHANGES, f"job.max_staleness={bound}")
    for name in bounds:
        own_flowd.wait_step(name, 5)
    own_flowd.kill()
    own_flowd.wait_gone()
    own_flowd.up()
    for name in bounds:
        status = own_flowd.status(name)
        assert status["state"] == "interrupted"
        assert f"flowctl resume {name}" in status["error"]
        own_flowd.request("resume", job=name)
    for name, bound in bounds.items():
        own_flowd.wait_done(name)
        lines = own_flowd.check_done(name, steps=STEPS)
        assert lines[-1]["attempt"] == 1
        assert numbers(lines) == undisturbed(flowd, bound)


def test_inline_job_gives_the_numbers_of_processes(flowd: Flowd) -> None:
    """One loop in one process or many processes: the same job."""
    options = [word for change in CHANGES for word in ("--set", change)]
    done = flowd.ctl(
        "run",
        "--inline",
        str(FAST),
        "--set",
        "job.name=inline",
        "--set",
        "job.max_staleness=1",
        *options,
    )
    assert done.returncode == 0, done.stderr
    assert numbers(flowd.steps("inline")) == undisturbed(flowd, 1)
