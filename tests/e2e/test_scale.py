"""`flowctl scale` while a job runs: devices move between stages and nothing of the work is lost."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flowd_process import Flowd

ENDLESS = 100_000


@contextmanager
def running(flowd: Flowd, name: str, *changes: str) -> Iterator[None]:
    """A job that runs until the block ends, then is cancelled with a sound ledger."""
    flowd.submit(name, f"job.steps={ENDLESS}", *changes)
    flowd.wait_step(name, 3)
    yield
    step = flowd.status(name)["step"]
    flowd.wait_step(name, step + 5)
    assert flowd.ctl("cancel", name).returncode == 0
    counts = flowd.audit(name)
    assert counts["committed"] % 8 == 0
    lines = flowd.steps(name)
    trained = [group for line in lines for group in line["group_ids"]]
    assert len(trained) == len(set(trained)) == 8 * len(lines)


def scale(flowd: Flowd, name: str, change: str, *options: str) -> dict[str, Any]:
    done: dict[str, Any] = flowd.ctl_json("scale", change, "--job", name, "--wait", *options)
    return done


def devices(flowd: Flowd, name: str, stage: str) -> list[str]:
    return [device for actor in flowd.actors(name, stage) for device in actor["devices"]]


def test_rollout_grows_and_shrinks_within_seconds(flowd: Flowd) -> None:
    """New rollout actors deliver at once; leaving ones hand back what they hold."""
    name = "scale-rollout"
    with running(flowd, name):
        done = scale(flowd, name, "rollout=+2")
        assert done["seconds_total"] < 2.0, done
        assert done["seconds_first_output"] is not None
        assert done["started"] == ["rollout-2", "rollout-3"]
        assert len(set(devices(flowd, name, "rollout"))) == 4
        states = {actor["name"]: actor["state"] for actor in flowd.actors(name, "rollout")}
        assert states == {f"rollout-{number}": "ready" for number in range(4)}

        done = scale(flowd, name, "rollout=-2")
        assert sorted(done["stopped"]) == ["rollout-2", "rollout-3"]
        assert len(devices(flowd, name, "rollout")) == 2

        done = scale(flowd, name, "rollout=3")
        assert done["started"] == ["rollout-4"], "names are never used twice"
        assert len(devices(flowd, name, "rollout")) == 3
    assert {line["attempt"] for line in flowd.metrics(name)} == {0}


@pytest.mark.parametrize("options", [(), ("--from", "rollout")])
def test_trainer_grows_to_two_ranks_at_a_step_boundary(
    flowd: Flowd, options: tuple[str, ...]
) -> None:
    """The old trainer commits, a new one with more ranks goes on from there; no step is taken back."""
    name = f"scale-trainer{'-from' if options else ''}"
    # With --from, no device is idle: one of rollout's has to move.
    rollout = 11 if options else 2
    with running(flowd, name, f"rollout.devices={rollout}"):
        scale(flowd, name, "trainer=+1", *options)
        trainers = flowd.actors(name, "trainer")
        assert [actor["name"] for actor in trainers] == ["trainer-1", "trainer-1.1"]
        assert len(set(devices(flowd, name, "trainer"))) == 2
        assert len(devices(flowd, name, "rollout")) == rollout - len(options) // 2
        assert not set(devices(flowd, name, "trainer")) & set(devices(flowd, name, "rollout"))
    steps = [line["step"] for line in flowd.metrics(name)]
    assert steps == list(range(len(steps)))


def test_env_actors_come_and_go(flowd: Flowd) -> None:
    """Env actors need no device; those that leave give their tickets back."""
    name = "scale-env"
    with running(flowd, name):
        assert scale(flowd, name, "env=+1")["started"] == ["env-2"]
        assert scale(flowd, name, "env=1")["stopped"] == ["env-1", "env-2"]
        assert [actor["name"] for actor in flowd.actors(name, "env")] == ["env-0"]


def test_collocated_rollout_grows(flowd: Flowd) -> None:
    """The device joins the shared set, and the stages go on taking turns."""
    name = "scale-collocated"
    with running(flowd, name, "job.mode=collocated"):
        done = scale(flowd, name, "rollout=+1")
        assert done["seconds_first_output"] is not None
        assert len(devices(flowd, name, "rollout")) == 3


def test_request_beyond_what_there_is_changes_nothing(flowd: Flowd) -> None:
    """Exit code 2, one sentence, the plan as before."""
    name = "scale-refused"
    with running(flowd, name):
        before = [(actor["name"], actor["pid"]) for actor in flowd.actors(name)]
        for change in ("rollout=+40", "rollout=-2", "trainer=0", "critic=+1"):
            refused = flowd.ctl("scale", change, "--job", name, "--wait")
            assert refused.returncode == 2, change
            assert len(refused.stderr.splitlines()) == 1
            assert refused.stdout == ""
        assert [(actor["name"], actor["pid"]) for actor in flowd.actors(name)] == before


def test_interpreter_that_vanished_leaves_the_job_as_it_was(flowd: Flowd, tmp_path: Path) -> None:
    """The actor that cannot be started is not there, its caller is told why, and the next one can be."""
    name = "scale-vanished"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with running(flowd, name, f"env.python={python}"):
        before = [(actor["name"], actor["pid"]) for actor in flowd.actors(name)]
        python.rename(tmp_path / "gone")
        failed = flowd.ctl("scale", "env=+1", "--job", name, "--wait")
        assert failed.returncode == 1
        assert f"python = '{python}' cannot be executed" in failed.stderr
        assert f'job "{name}" goes on as before' in failed.stderr
        assert [(actor["name"], actor["pid"]) for actor in flowd.actors(name)] == before
        (tmp_path / "gone").rename(python)
        assert scale(flowd, name, "env=+1")["started"] == ["env-3"]
