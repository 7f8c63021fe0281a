"""Which checkpoints of a run stay on disk, and which of them is the best. Torch-free.

Only commits count: what a crash left without a manifest is no checkpoint, and is removed.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from actors.conductor.manifest import FILE as MANIFEST_FILE
from actors.conductor.manifest import checkpoint_dir, committed_steps

SCORE_FILE = "score.json"


class _Score(msgspec.Struct, frozen=True):
    score: float


def kept(
    steps: Iterable[int],
    scores: Mapping[int, float],
    *,
    keep: int,
    keep_every_steps: int = 0,
    keep_best: int = 0,
) -> set[int]:
    """The commits that stay: the newest, those at multiples of some steps, those that score best.

    scores: by step, higher is better, not of every commit; of equal ones the newer is better
    """
    ordered = sorted(steps)
    stay = set(ordered[-keep:])
    if keep_every_steps:
        stay |= {step for step in ordered if step and step % keep_every_steps == 0}
    ranked = sorted((step for step in ordered if step in scores), key=lambda s: (scores[s], s))
    return stay | set(ranked[-keep_best:] if keep_best else ())


def prune(run_dir: Path, *, keep: int, keep_every_steps: int, keep_best: int) -> None:
    """Remove the checkpoints that `kept` does not name, and those that were never finished."""
    stay = kept(
        committed_steps(run_dir),
        scores(run_dir),
        keep=keep,
        keep_every_steps=keep_every_steps,
        keep_best=keep_best,
    )
    names = {checkpoint_dir(run_dir, step).name for step in stay}
    for directory in (run_dir / "checkpoints").glob("step-*"):
        if directory.name not in names:
            # The manifest first: a removal that is interrupted must not leave half a commit.
            (directory / MANIFEST_FILE).unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)


def score_commit(run_dir: Path, step: int, score: float) -> bool:
    """Say how good the policy of a step is; higher is better. False when it has no commit on disk.

    The score lives and dies with the commit: a step that is rolled back and taken again has none.
    """
    directory = checkpoint_dir(run_dir, step)
    if not (directory / MANIFEST_FILE).exists():
        return False
    partial = directory / f".{SCORE_FILE}.partial"
    try:
        partial.write_bytes(msgspec.json.encode(_Score(float(score))) + b"\n")
        os.replace(partial, directory / SCORE_FILE)
    except FileNotFoundError:
        return False  # removed meanwhile
    return True


def scores(run_dir: Path) -> dict[int, float]:
    """The scores of commits by step; NaN is no score."""
    found = {}
    for step in committed_steps(run_dir):
        try:
            content = (checkpoint_dir(run_dir, step) / SCORE_FILE).read_bytes()
            found[step] = msgspec.json.decode(content, type=_Score).score
        except (FileNotFoundError, msgspec.DecodeError):
            continue  # not scored; NaN is null in JSON
    return found


def best_commit(run_dir: Path) -> int | None:
    """The step of the commit with the best score, the newest of equals; None when none has one."""
    known = scores(run_dir)
    return max(known, key=lambda step: (known[step], step), default=None)
