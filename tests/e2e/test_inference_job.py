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
