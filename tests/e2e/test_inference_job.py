"""Whole jobs whose groups pass through inference actors."""

import pytest
from flowd_process import FAST, Flowd, kill

STEPS = 30
CHANGES = (
    f"job.steps={STEPS}",
    "env.task=e2e_tasks:Parity",
    "algorithm.kl_coefficient=0.1",
    "trainer.learning_rate=1e-3",
)
ACTOR_CRITIC = (
    f"job.steps={STEPS}",
    "env.task=e2e_tasks:Parity",
    "algorithm.name=decoupled_ppo",
    "algorithm.mini_batches=2",
    "trainer.learning_rate=1e-3",
)
COMPUTED_OUTSIDE = ("inference.devices=1", 'inference.computes=["proximal","values"]')


def test_a_killed_inference_actor_loses_nothing(flowd: Flowd) -> None:
    """It is the only one: what it held waits for its next life, which reads the run's reference again."""
    name = "killed-inference"
    flowd.submit(name, *CHANGES, "inference.devices=1")
    flowd.wait_step(name, 3)
    kill(flowd.pid_of(name, "inference-0"))
    flowd.wait_done(name)
    (killed,) = flowd.actors(name, "inference")
    assert killed["restarts"] == 1
    lines = flowd.check_done(name, steps=STEPS)
    assert lines[-1]["attempt"] == 0
    assert lines[-1]["kl_reference"] > 0


def test_inference_takes_turns_and_is_scaled(flowd: Flowd) -> None:
    """Collocated on two devices with rollout and trainer: no device more, and a third one joins while it runs."""
    name = "collocated-inference"
    flowd.submit(name, *CHANGES, "inference.devices=2", "job.mode=collocated")
    flowd.wait_step(name, 2)
    held = {device for actor in flowd.actors(name) for device in actor["devices"]}
    assert len(held) == 2
    scaled = flowd.ctl_json("scale", "inference=+1", "--job", name, "--wait")
    assert scaled["started"] == ["inference-2"]
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS)
    assert lines[-1]["kl_reference"] > 0


def test_numbers_are_those_of_a_trainer_with_its_own_reference(flowd: Flowd) -> None:
    """Deterministic jobs: inline and in processes bit for bit, inside the trainer to 1e-6."""
    deterministic = (*CHANGES, "job.deterministic=true", "job.steps=6", "job.seed=7")
    flowd.submit("reference-inside", *deterministic)
    flowd.submit("reference-outside", *deterministic, "inference.devices=1")
    options = [w for c in (*deterministic, "inference.devices=1") for w in ("--set", c)]
    done = flowd.ctl("run", "--inline", str(FAST), "--set", "job.name=reference-inline", *options)
    assert done.returncode == 0, done.stderr
    for name in ("reference-inside", "reference-outside"):
        flowd.wait_done(name)
    inside, outside, inline = (
        [(line["kl_reference"], line["loss"], line["reward_mean"]) for line in flowd.steps(name)]
        for name in ("reference-inside", "reference-outside", "reference-inline")
    )
    assert outside == inline
    assert outside == [pytest.approx(numbers, abs=1e-6) for numbers in inside]
    assert inside[-1][0] > 1e-4


@pytest.mark.parametrize("killed", ["inference-0", "trainer-0"])
def test_who_answers_or_who_asks_is_killed(flowd: Flowd, killed: str) -> None:
    """The trainer holds its step's groups and asks the next life of the only inference actor about them; without it the
    job goes back to its last commit, and what was asked before is void."""
    name = f"reading-{killed}-killed"
    flowd.submit(name, *ACTOR_CRITIC, *COMPUTED_OUTSIDE)
    flowd.wait_step(name, 7)
    kill(flowd.pid_of(name, killed))
    flowd.wait_done(name)
    (found,) = flowd.actors(name, killed.partition("-")[0])
    assert found["restarts"] == 1
    lines = flowd.check_done(name, steps=STEPS)
    assert lines[-1]["attempt"] == (killed == "trainer-0")
    assert lines[-1]["value_loss"] > 0


def test_readers_take_turns_and_are_scaled(flowd: Flowd) -> None:
    """Everything is computed outside, collocated on two devices; a third actor joins while the job runs."""
    name = "collocated-readers"
    everything = 'inference.computes=["reference","proximal","values"]'
    changes = (*ACTOR_CRITIC, "algorithm.kl_coefficient=0.1", "inference.devices=2", everything)
    flowd.submit(name, *changes, "job.mode=collocated")
    flowd.wait_step(name, 2)
    scaled = flowd.ctl_json("scale", "inference=+1", "--job", name, "--wait")
    assert scaled["started"] == ["inference-2"]
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS)
    assert lines[-1]["kl_reference"] > 0
    assert lines[-1]["value_loss"] > 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("on-policy", ("job.max_staleness=0",)),
        ("stale", ("job.max_staleness=2", "algorithm.mask_level=token")),
        ("own-trunk", ("algorithm.critic=model", "trainer.devices=2", "job.max_staleness=0")),
    ],
)
def test_numbers_are_those_of_a_trainer_that_reads_its_own_policy(
    flowd: Flowd, name: str, changes: tuple[str, ...]
) -> None:
    """Deterministic jobs, whatever the staleness: proximal log-probs and values are those of the step's own version."""
    deterministic = (*ACTOR_CRITIC, *changes, "job.deterministic=true", "job.steps=6", "job.seed=7")
    flowd.submit(f"{name}-inside", *deterministic)
    flowd.wait_done(f"{name}-inside")
    flowd.submit(f"{name}-outside", *deterministic, *COMPUTED_OUTSIDE)
    flowd.wait_done(f"{name}-outside")
    keys = ("loss", "value_loss", "ratio_mean", "correction_mean", "grad_norm", "reward_mean")
    inside, outside = (
        [[line[key] for key in keys] for line in flowd.steps(f"{name}-{where}")]
        for where in ("inside", "outside")
    )
    assert outside == [pytest.approx(numbers, abs=1e-6, rel=1e-5) for numbers in inside]
    assert inside[-1][1] > 0


def test_readings_are_the_same_in_one_process(flowd: Flowd) -> None:
    """Bit for bit: groups are read one by one, with exactly the version that their step begins with."""
    changes = (*ACTOR_CRITIC, *COMPUTED_OUTSIDE, "job.deterministic=true", "job.steps=6")
    flowd.submit("readings-processes", *changes)
    options = [word for change in changes for word in ("--set", change)]
    done = flowd.ctl("run", "--inline", str(FAST), "--set", "job.name=readings-inline", *options)
    assert done.returncode == 0, done.stderr
    flowd.wait_done("readings-processes")
    processes, inline = (
        [(line["loss"], line["value_loss"]) for line in flowd.steps(f"readings-{where}")]
        for where in ("processes", "inline")
    )
    assert processes == inline
