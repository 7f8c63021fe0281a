"""deterministic = true: the same steps bit for bit, wherever the job runs and whatever dies on the way."""

import signal
from typing import Any

import pytest
import torch
from flowd_process import DEADLINE_S, FAST, Flowd, environment, kill, wait_for
from forked import Forked

from actors.conductor.manifest import checkpoint_dir, newest_manifest
from actors.trainer.shard_files import Shards

STEPS = 40
SAME = (
    *("step", "group_ids", "reward_mean", "reward_std", "loss", "grad_norm", "entropy", "tokens"),
    *("learning_rate", "kl_sampler", "tokens_trained"),
)
# Rewards that differ within groups: otherwise every loss would be zero, and so equal.
CHANGES = (
    f"job.steps={STEPS}",
    "job.deterministic=true",
    "env.task=e2e_tasks:Parity",
    "job.seed=7",
)


Outcome = tuple[list[dict[str, Any]], dict[str, bytes]]


def outcome(flowd: Flowd, name: str) -> Outcome:
    """What must be the same: numbers of every step, and every bit of the last checkpoint, moments and counters too."""
    lines = [{key: line[key] for key in SAME} for line in flowd.steps(name)]
    return lines, {name: bits(tensor) for name, tensor in last_state(flowd, name).items()}


def last_state(flowd: Flowd, name: str) -> Shards:
    run_dir = flowd.run(name).root
    newest = newest_manifest(run_dir)
    assert newest is not None
    return Shards(checkpoint_dir(run_dir, newest.step))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def named(prefix: str, bound: int, changes: tuple[str, ...]) -> str:
    what = {FILTERED: "-filtered", ADAPTER: "-adapter"}.get(changes, "")
    return f"{prefix}-{bound}{what}"


def steps_of(changes: tuple[str, ...]) -> int:
    """Short where there are changes."""
    return FEW_STEPS if changes else STEPS


def undisturbed(flowd: Flowd, bound: int, *changes: str) -> Outcome:
    """Of a job that nothing happens to; run once for each bound and set of changes."""
    name = named("calm", bound, changes)
    steps = steps_of(changes)
    if not flowd.run(name).root.exists():
        flowd.submit(name, *CHANGES, f"job.max_staleness={bound}", *changes)
        flowd.wait_done(name)
    lines = flowd.check_done(name, steps=steps)
    assert sum(line["loss"] != 0.0 for line in lines) > steps // 2
    calm = outcome(flowd, name)
    assert any(name.startswith("exp_avg_sq.") for name in calm[1])
    return calm


FEW_STEPS = 15
ADAPTER = ("model.lora.rank=2", "trainer.learning_rate=0.01", f"job.steps={FEW_STEPS}")
# Of four answers about half are right: five of eight groups are sampled again.
FILTERED = (
    "algorithm.dynamic_sampling=true",
    "algorithm.filter_range=[0.4, 0.6]",
    f"job.steps={FEW_STEPS}",
)


@pytest.mark.parametrize(
    ("bound", "changes"),
    [(0, ()), (1, ()), (1, FILTERED), (1, ADAPTER)],
    ids=["0", "1", "1-filtered", "1-adapter"],
)
def test_killed_trainer_changes_no_number(
    flowd: Flowd, bound: int, changes: tuple[str, ...]
) -> None:
    """What is sampled and trained again after a rollback is what it was; so is what is filtered out, or an adapter."""
    calm = undisturbed(flowd, bound, *changes)
    name = named("killed-deterministic", bound, changes)
    flowd.submit(name, *CHANGES, f"job.max_staleness={bound}", *changes)
    flowd.wait_step(name, 8)
    kill(flowd.pid_of(name, "trainer-0"))
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=steps_of(changes))
    assert lines[-1]["attempt"] == 1
    assert outcome(flowd, name) == calm
    if changes == FILTERED:
        assert all(line["useful_share"] == 1.0 and line["filtered_share"] > 0 for line in lines)


def test_flowd_and_actors_gone_then_resumed_changes_no_number(
    flowd: Flowd, own_flowd: Flowd
) -> None:
    """kill -9 of flowd, the actors leave after their grace, and the next flowd resumes from the last commit.

    Nobody follows within the grace: the fork server frees the shared memory of the weights, nothing is left.
    """
    own_flowd.up("--orphan-grace-s", "1")
    bounds = {f"lost-{bound}": bound for bound in (0, 1)}
    for name, bound in bounds.items():
        own_flowd.submit(name, *CHANGES, f"job.max_staleness={bound}")
    for name in bounds:
        own_flowd.wait_step(name, 5)
    assert list(own_flowd.paths.weights.rglob("*.safetensors"))
    own_flowd.kill()
    own_flowd.wait_gone()
    assert own_flowd.left_behind() == []
    assert not list(own_flowd.paths.weights.parent.glob(f"{own_flowd.paths.weights.name}*"))
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
        assert outcome(own_flowd, name) == undisturbed(flowd, bound)


def inline(name: str) -> list[str]:
    """The words of an undisturbed job, bound 1, in one process."""
    changes = [*CHANGES, f"job.name={name}", "job.max_staleness=1"]
    options = [word for change in changes for word in ("--set", change)]
    return ["run", "--inline", str(FAST), *options]


def test_inline_job_gives_the_numbers_of_processes(flowd: Flowd) -> None:
    """One loop in one process or many processes: the same job."""
    done = flowd.ctl(*inline("inline"))
    assert done.returncode == 0, done.stderr
    assert outcome(flowd, "inline") == undisturbed(flowd, 1)


def test_inline_job_that_was_stopped_is_resumed_as_processes(flowd: Flowd) -> None:
    """Stopped by Ctrl-C after a few commits; flowd goes on from its run directory to the same end."""
    name = "inline-stopped"
    with Forked(*flowd.module_line("flowctl", *inline(name)), env=environment()) as stopped:
        wait_for(lambda: len(flowd.metrics(name)) > 12, "12 steps inline")
        stopped.send_signal(signal.SIGINT)
        stopped.wait(DEADLINE_S)
    assert 12 < len(flowd.metrics(name)) < STEPS
    flowd.request("resume", job=name)
    flowd.wait_done(name)
    assert flowd.check_done(name, steps=STEPS)[-1]["attempt"] == 1
    assert outcome(flowd, name) == undisturbed(flowd, 1)


def test_resumed_on_other_numbers_of_ranks_it_learns_the_same(flowd: Flowd) -> None:
    """One rank, then two, then one again, to the steps of an undisturbed job: equal but for the order of sums."""
    changes = [*CHANGES, "job.max_staleness=0", "checkpoint.keep=9"]
    flowd.submit("one-rank", *changes, "job.steps=15")
    flowd.wait_done("one-rank")
    flowd.submit("ranks", *changes, "job.steps=5")
    flowd.wait_done("ranks")
    for ranks, steps in ((2, 10), (1, 15)):
        words = [f"trainer.devices={ranks}", f"job.steps={steps}"]
        done = flowd.ctl("resume", "ranks", "--follow", *(w for x in words for w in ("--set", x)))
        assert done.returncode == 0, done.stderr
        assert len(flowd.actors("ranks", "trainer")) == ranks
    flowd.check_done("ranks", steps=15)
    files = [len(list(d.glob("state-*"))) for d in sorted(flowd.run("ranks").checkpoints.iterdir())]
    assert files == [1, 1, 2, 1], "ranks that wrote steps 0, 5, 10 and 15"
    expected, found = last_state(flowd, "one-rank"), last_state(flowd, "ranks")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert bits(found["updates"]) == bits(expected["updates"])
    assert 'job "ranks" is done' in flowd.ctl("resume", "ranks").stderr
    refused = flowd.ctl("resume", "ranks", "--set", "job.seed=8", "--set", "job.steps=20")
    assert refused.returncode == 2
    assert "job.seed = 8, and was 7" in refused.stderr
