"""Checkpoints: the trainer's state and the manifest of a step, on disk as one atomic unit.

The state is written and synced first, under a name that does not count; the manifest, made visible by one rename, is
the commit (see `manifest`). In three blocking calls, so that training can go on after the first: `stage` copies the
state to the host, `write` puts the copy on disk, `commit` makes it count.

Of a job that trains an adapter a checkpoint holds the adapter, and a checksum of the frozen model: that one is what
[model] path says, or else in the run's directory, once (see `reference_file`).

A deterministic job samples with exact versions, also older ones than the commit's: the commit keeps those too.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from actors.backends.contract import ADAPTER, TrainingEngine
from actors.backends.reference_file import read_reference
from actors.conductor.manifest import Manifest, checkpoint_dir, newest_manifest, write_manifest
from actors.errors import BadCheckpoint
from actors.retention import prune
from actors.trainer.config import CheckpointConfig
from actors.trainer.shard_files import Shards, bad_checkpoint, sync, write_shards
from actors.trainer.staging import HostCopy, Staged

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_POLICY = re.compile(r"policy-(\d+)\.safetensors")
Tensors = Mapping[str, "torch.Tensor"]


class CheckpointWriter:
    """One rank's part in the checkpoints of a run; one of them at a time.

    group: of all ranks, for objects on the host; None where there is one rank
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._group = group
        self._copy = HostCopy()
        self._step = 0
        self._staged = Staged({}, {})
        self._policies: Mapping[int, Tensors] = {}

    def stage(self, step: int, state: Tensors, policies: Mapping[int, Tensors] = {}) -> None:
        """Copy the state of a step to the host; afterwards it may change. The one before has to be written.

        policies: published weights by version, for `load_policies`; they are not copied. For one rank to write.
        """
        self._step = step
        self._staged = self._copy.take(state)
        self._policies = policies

    def write(self, *, alone: bool = False) -> None:
        """Write what was staged. When this returns on one rank, the parts of all are on disk.

        alone: the other ranks do not take part, and the state is whole here
        """
        directory = checkpoint_dir(self._run_dir, self._step)
        write_shards(directory, self._staged, None if alone else self._group)
        for version, tensors in self._policies.items():
            path = directory / f"policy-{version}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
            sync(path)
        self._policies = {}

    def commit(self, manifest: Manifest) -> None:
        """Make what was written count, and remove the checkpoints that are no longer wanted."""
        write_manifest(self._run_dir, manifest)
        prune(
            self._run_dir,
            keep=self._config.keep,
            keep_every_steps=self._config.keep_every_steps,
            keep_best=self._config.keep_best,
        )


def load(run_dir: Path, engine: TrainingEngine) -> Manifest:
    """Put the newest commit into the engine. Raises BadCheckpoint when it cannot be read or does not fit."""
    manifest = newest_manifest(run_dir)
    if manifest is None:
        raise BadCheckpoint(f"{run_dir} has no commit: the run never reached its first step")
    directory = checkpoint_dir(run_dir, manifest.step)
    state: Tensors = Shards(directory)
    if any(name.startswith(ADAPTER) for name in state):
        began = {f"model.{name}": tensor for name, tensor in read_reference(run_dir).items()}
        state = {**began, **state}
    try:
        engine.load_state(state)
    except ValueError as error:
        raise bad_checkpoint(directory, str(error)) from error
    return manifest


def load_policies(run_dir: Path, step: int) -> dict[int, "dict[str, torch.Tensor]"]:
    """The policies that were saved with the commit of a step, by version."""
    found = {}
    for path in checkpoint_dir(run_dir, step).glob("policy-*.safetensors"):
        if match := _POLICY.fullmatch(path.name):
            found[int(match[1])] = load_file(path)
    return dict(sorted(found.items()))
