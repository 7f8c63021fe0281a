"""Which commits stay on disk, and which is the best."""

from pathlib import Path

import pytest

from actors.conductor.manifest import Manifest, checkpoint_dir, committed_steps, write_manifest
from actors.retention import best_commit, kept, prune, score_commit, scores

STEPS = range(0, 101, 10)


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        ({"keep": 2}, {90, 100}),
        ({"keep": 1, "keep_every_steps": 40}, {40, 80, 100}),
        ({"keep": 1, "keep_best": 1}, {50, 100}),
        ({"keep": 1, "keep_best": 2}, {30, 50, 100}),
        ({"keep": 1, "keep_best": 9}, {10, 30, 50, 100}),
        ({"keep": 20}, set(STEPS)),
    ],
)
def test_newest_regular_and_best_commits_stay(rules: dict[str, int], stay: set[int]) -> None:
    """Of 30 and 50, which score the same, the newer is better."""
    assert kept(STEPS, {10: 0.1, 30: 0.7, 50: 0.7}, **rules) == stay


def test_a_run_without_commits_keeps_none() -> None:
    assert kept([], {}, keep=3, keep_every_steps=1, keep_best=1) == set()


def commit(run_dir: Path, step: int) -> None:
    write_manifest(run_dir, Manifest(step=step, policy_version=step, run_attempt=0))


def test_scores_live_and_die_with_their_commits(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step)
    assert best_commit(tmp_path) is None
    assert score_commit(tmp_path, 2, 0.5)
    assert score_commit(tmp_path, 3, 0.25)
    assert score_commit(tmp_path, 4, float("nan"))
    assert not score_commit(tmp_path, 9, 1.0)
    assert scores(tmp_path) == {2: 0.5, 3: 0.25}
    assert best_commit(tmp_path) == 2
    prune(tmp_path, keep=1, keep_every_steps=0, keep_best=1)
    assert committed_steps(tmp_path) == [2, 4]
    assert score_commit(tmp_path, 2, 0.1)
    assert best_commit(tmp_path) == 2
    prune(tmp_path, keep=1, keep_every_steps=0, keep_best=0)
    assert best_commit(tmp_path) is None


def test_what_was_never_finished_is_removed(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    unfinished = checkpoint_dir(tmp_path, 2)
    unfinished.mkdir()
    assert not score_commit(tmp_path, 2, 1.0)
    prune(tmp_path, keep=1, keep_every_steps=0, keep_best=0)
    assert not unfinished.exists()
    assert committed_steps(tmp_path) == [1]
