"""Shards of a trainer's state on disk: the storage that torch.distributed.checkpoint plans for, in safetensors files.

torch.distributed.checkpoint decides which rank writes what: each its own shards, and one of them what all have. Here is
only where the bytes go: one file per rank, whose header says all there is to know. Its own files would cost a small
state much: a pickle for every tensor and one for the whole, 34 ms of Python for 80 tensors where these take 10.

A tensor that is whole in a file goes by its name, a part of one by `name[first row, first column, …]`.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from actors.errors import BadCheckpoint, CheckpointNotWritten
from actors.trainer.staging import Staged

RANKS = "ranks"  # in every header: how many files there are
SIZES = "sizes"  # and of what is there in part: how large the whole is


def write_shards(directory: Path, staged: Staged, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's part of a state into a directory, which is made anew. On disk, of all ranks, on return.

    staged: flat; plain tensors are the same on every rank, of DTensors each has its shard
    group: of all ranks, for objects on the host (gloo); None writes the whole state from this process alone

    Raises CheckpointNotWritten, on every rank, with what went wrong on whichever.
    """
    writer = _Writer(directory)
    planner = _Planner(staged)
    try:
        if group is not None:
            state = dict(staged.layout)
            save(state, storage_writer=writer, planner=planner, process_group=group)
            return
        writer.set_up_storage_writer(True)
        planner.set_up_planner(dict(staged.layout), is_coordinator=True)
        plans, _ = planner.create_global_plan([planner.create_local_plan()])
        (plan,) = writer.prepare_global_plan(plans)
        writer.write_data(planner.finish_plan(plan), planner)
    except (CheckpointException, OSError, SafetensorError) as error:
        raise CheckpointNotWritten(
            f"{directory} could not be written: {error}; the commit before is whole"
        ) from error


def shard_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"state-{rank}.safetensors"


class Shards(Mapping[str, Tensor]):
    """What `write_shards` wrote, from however many ranks: whole tensors by name, on the host, not to be changed.

    A tensor is read when it is asked for: pages of the file where it is whole in one, else put together from its parts.
    Raises BadCheckpoint when files are missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: list[Any] = []
        self._parts: dict[str, list[_Part]] = {}
        try:
            self._open()
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise bad_checkpoint(directory, str(error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        parts = self._parts[name]
        read = [(part, part.file.get_tensor(part.key)) for part in parts]
        if len(read) == 1:
            first: Tensor = read[0][1]
            return first
        whole = torch.empty(parts[0].size, dtype=read[0][1].dtype)
        for part, tensor in read:
            bounds = zip(part.offsets, tensor.shape, strict=True)
            whole[tuple(slice(start, start + length) for start, length in bounds)] = tensor
        return whole

    def _open(self) -> None:
        rank, num_ranks = 0, 1
        while rank < num_ranks:
            name = shard_file(rank)
            file: Any = safe_open(self._directory / name, framework="pt")
            header = file.metadata() or {}
            if RANKS not in header:
                raise ValueError(f"{name} is no shard of a checkpoint")
            num_ranks, sizes = int(header[RANKS]), json.loads(header[SIZES])
            for key in file.keys():
                shape = file.get_slice(key).get_shape()
                tensor, _, offsets = key.partition("[") if key in sizes else (key, "", "")
                part = _Part(
                    file=file,
                    key=key,
                    size=sizes.get(key, shape),
                    offsets=json.loads(f"[{offsets}") if offsets else [0] * len(shape),
                    elements=math.prod(shape),
                )
                self._parts.setdefault(tensor, []).append(part)
            rank += 1
        for tensor, parts in self._parts.items():
            if sum(part.elements for part in parts) != math.prod(parts[0].size):
                raise ValueError(f"parts of {tensor} are missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Of a tensor in a file. size: of the whole"""

    file: Any
    key: str
    size: list[int]
    offsets: list[int]
    elements: int


def bad_checkpoint(directory: Path, what: str) -> BadCheckpoint:
    """The error about a checkpoint that cannot be used, with the way out."""
    return BadCheckpoint(
        f"{directory} cannot be loaded: {what}; remove that directory to go on from the commit before"
    )


class _Planner(DefaultSavePlanner):
    """Plans by the layout of a state, and writes what its copy on the host holds."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._host = staged.host

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._host[index.fqn]


class _Writer(StorageWriter):
    """Writes the items of a rank's plan into one file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Before any rank has a plan, and so before any writes: the coordinator makes room."""
        if is_coordinator:
            if self._directory.exists():
                shutil.rmtree(self._directory)  # of an attempt that never committed here
            self._directory.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Tell every rank its place."""
        return [replace(plan, storage_data=(rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank, num_ranks = plan.storage_data
        tensors: dict[str, Tensor] = {}
        sizes: dict[str, list[int]] = {}
        results = []
        for item in plan.items:
            place = item.tensor_data
            assert place is not None, f"{item.index.fqn} is no tensor"
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            if tensor.numel() or tensor.shape == place.size:  # a rank's shard may be empty
                key = item.index.fqn
                if tensor.shape != place.size:
                    key += str(list(place.chunk.offsets))
                    sizes[key] = list(place.size)
                tensors[key] = tensor.detach().contiguous()
            results.append(
                WriteResult(index=item.index, size_in_bytes=tensor.nbytes, storage_data=None)
            )
        header = {RANKS: str(num_ranks), SIZES: json.dumps(sizes)}
        path = self._directory / shard_file(rank)
        save_file(tensors, path, metadata=header)
        sync(path)
        sync(self._directory)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The headers say it all."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
