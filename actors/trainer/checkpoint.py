"""Checkpoints: the trainer's state and the manifest of a step, on disk as one atomic unit.

The state is written and synced first, under a name that does not count; the manifest, made visible by one rename, is
the commit (see `manifest`). Blocking: call it in the worker thread.

A deterministic job samples with exact versions, also older ones than the commit's: the commit keeps those too.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from actors.backends.contract import TrainingEngine
from actors.conductor.manifest import FILE as MANIFEST_FILE
from actors.conductor.manifest import (
    Manifest,
    checkpoint_dir,
    newest_manifest,
    write_manifest,
)
from actors.errors import BadCheckpoint

if TYPE_CHECKING:
    import torch

STATE_FILE = "state.safetensors"
_POLICY = re.compile(r"policy-(\d+)\.safetensors")
Tensors = Mapping[str, "torch.Tensor"]


def save(
    run_dir: Path,
    state: Tensors,
    manifest: Manifest,
    *,
    keep: int,
    policies: Mapping[int, Tensors] | None = None,
) -> None:
    """Commit a step; afterwards only the newest `keep` checkpoints stay.

    policies: published weights by version, for `load_policies`
    """
    directory = checkpoint_dir(run_dir, manifest.step)
    if directory.exists():
        shutil.rmtree(directory)  # of a run attempt that was rolled back before it committed here
    directory.mkdir(parents=True)
    _write(directory / STATE_FILE, state)
    for version, tensors in (policies or {}).items():
        _write(directory / f"policy-{version}.safetensors", tensors)
    write_manifest(run_dir, manifest)
    # Counted are commits alone: what a crash left without a manifest, of a later step perhaps, is no checkpoint.
    directories = list((run_dir / "checkpoints").glob("step-*"))
    kept = sorted(d for d in directories if (d / MANIFEST_FILE).exists())[-keep:]
    for old in directories:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def load(run_dir: Path, engine: TrainingEngine) -> Manifest:
    """Put the newest commit into the engine. Raises BadCheckpoint when it cannot be read or does not fit."""
    manifest = newest_manifest(run_dir)
    if manifest is None:
        raise BadCheckpoint(f"{run_dir} has no commit: the run never reached its first step")
    path = checkpoint_dir(run_dir, manifest.step) / STATE_FILE
    try:
        engine.load_state(load_file(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{path} cannot be loaded: {error}; remove its directory to go on from the commit before"
        ) from error
    return manifest


def load_policies(run_dir: Path, step: int) -> dict[int, "dict[str, torch.Tensor]"]:
    """The policies that were saved with the commit of a step, by version."""
    found = {}
    for path in checkpoint_dir(run_dir, step).glob("policy-*.safetensors"):
        if match := _POLICY.fullmatch(path.name):
            found[int(match[1])] = load_file(path)
    return dict(sorted(found.items()))


def _write(path: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
