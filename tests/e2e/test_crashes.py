"""kill -9 of every kind of process while a job runs: it ends with every step, and the ledger proves it."""

import sys
from pathlib import Path

import psutil
import pytest
from flowd_process import Flowd, kill, wait_for

from actors.conductor.manifest import checkpoint_dir, newest_manifest

STEPS = 60
AT_STEP = 12  # kill there: well after a commit, with most of the job to come


def start_and_kill(flowd: Flowd, name: str, actor: str) -> None:
    flowd.submit(name, f"job.steps={STEPS}")
    flowd.wait_step(name, AT_STEP)
    kill(flowd.pid_of(name, actor))
    flowd.wait_done(name)


def restarts(flowd: Flowd, name: str) -> dict[str, int]:
    return {a["name"]: a["restarts"] for a in flowd.actors(name) if a["restarts"]}


@pytest.mark.parametrize("actor", ["rollout-1", "env-0"])
def test_killed_worker_is_replaced_and_its_work_played_again(flowd: Flowd, actor: str) -> None:
    """Rollout and env actors hold nothing that counts: no step is taken back, one actor restarts."""
    name = f"killed-{actor}"
    start_and_kill(flowd, name, actor)
    flowd.check_done(name, steps=STEPS)
    assert [line["attempt"] for line in flowd.metrics(name)] == [0] * STEPS
    assert restarts(flowd, name) == {actor: 1}


@pytest.mark.parametrize("actor", ["trainer-0", "conductor"])
def test_killed_trainer_or_conductor_takes_the_job_to_its_last_commit(
    flowd: Flowd, actor: str
) -> None:
    """The steps since the commit are taken again in attempt 1; every group is trained once all the same."""
    name = f"killed-{actor}"
    start_and_kill(flowd, name, actor)
    lines = flowd.check_done(name, steps=STEPS)
    attempts = [line["attempt"] for line in lines]
    assert attempts == sorted(attempts)
    assert set(attempts) == {0, 1}
    again = attempts.index(1)
    assert again % 5 == 0, "it goes on from a commit, which comes every 5 steps"
    assert again <= max(line["step"] for line in flowd.metrics(name) if line["attempt"] == 0) + 1
    assert restarts(flowd, name)[actor] == 1


STOP_IN_MID_WRITE = """
import os, pathlib, signal
from actors.trainer import shard_files

sync = shard_files.sync

def stop_once(path):
    marker = pathlib.Path(__file__).with_name("stopped")
    if path.parent.name == "step-00000010" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    sync(path)

shard_files.sync = stop_once
"""


@pytest.mark.slow  # two trainers that import everything; tests/actors/trainer/test_checkpoint.py has the writer alone
def test_trainer_killed_in_mid_write_leaves_the_commit_before_whole(
    flowd: Flowd, tmp_path: Path
) -> None:
    """The bytes of step 10 are in their file, the manifest is not there: the job goes on from step 5.

    `make test` keeps the promise by test_kill_in_mid_write_leaves_the_commit_before_whole of the writer, and by the
    killed trainers above.
    """
    (tmp_path / "sitecustomize.py").write_text(STOP_IN_MID_WRITE)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{tmp_path}:$PYTHONPATH" exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    name = "killed-in-mid-write"
    flowd.submit(name, f"job.steps={STEPS}", f"trainer.python={python}")
    wait_for((tmp_path / "stopped").exists, "the write of step 10")
    trainer = flowd.pid_of(name, "trainer-0")
    wait_for(lambda: process_state(trainer) == "T", "the trainer to stop")
    run_dir = flowd.run(name).root
    assert (checkpoint_dir(run_dir, 10) / "state-0.safetensors").stat().st_size > 0
    newest = newest_manifest(run_dir)
    assert newest is not None
    assert newest.step == 5
    kill(trainer)
    flowd.wait_done(name)
    lines = flowd.check_done(name, steps=STEPS)
    assert [line["attempt"] for line in lines] == [0] * 5 + [1] * (STEPS - 5)


def process_state(pid: int) -> str:
    """As `ps` shows it: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_killed_zygote_takes_all_actors_and_the_job_goes_on(flowd: Flowd) -> None:
    """Actors die with the zygote; flowd starts another one, and every actor again."""
    name = "killed-zygote"
    flowd.submit(name, f"job.steps={STEPS}")
    flowd.wait_step(name, AT_STEP)
    before = {actor["name"]: actor["pid"] for actor in flowd.actors(name)}
    # By kinship: what it forks is called like it until it has been given a name.
    (zygote,) = {psutil.Process(pid).ppid() for pid in before.values()}
    assert "flowd.zygote" in flowd.processes()[zygote]
    kill(zygote)
    flowd.wait_done(name)
    flowd.check_done(name, steps=STEPS)
    assert restarts(flowd, name) == dict.fromkeys(before, 1)
