"""Checkpoints on disk: which of them stay."""

from pathlib import Path

import torch

from actors.conductor.manifest import Manifest, checkpoint_dir, newest_manifest
from actors.trainer import checkpoint


def commit(run_dir: Path, step: int, keep: int) -> None:
    manifest = Manifest(step=step, policy_version=step, run_attempt=0)
    checkpoint.save(run_dir, {"weight": torch.full((2,), float(step))}, manifest, keep=keep)


def test_only_the_newest_commits_stay(tmp_path: Path) -> None:
    for step in range(4):
        commit(tmp_path, step, keep=2)
    assert sorted(d.name for d in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_what_a_crash_left_of_a_later_step_does_not_push_a_commit_out(tmp_path: Path) -> None:
    commit(tmp_path, 10, keep=1)
    unfinished = checkpoint_dir(tmp_path, 20)
    unfinished.mkdir()
    (unfinished / checkpoint.STATE_FILE).write_bytes(b"half")
    commit(tmp_path, 15, keep=1)
    newest = newest_manifest(tmp_path)
    assert newest is not None
    assert newest.step == 15
    assert not unfinished.exists()
