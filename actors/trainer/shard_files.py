"""Shards of a trainer's state on disk: the storage that torch.distributed.checkpoint plans for, in safetensors files.

torch.distributed.checkpoint decides which rank writes what (each its own shards, of what all have one of them), and
which slices a rank with another layout reads. Here is only where the bytes go: one file per rank, whose header says all
there is to know. Its own files would cost a small state more than the training step: a pickle for every tensor and one
for the whole, 34 ms of Python for 80 tensors where these take 10.

A tensor that is whole in a file goes by its name, a part of one by `name[first row, first column, …]`.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from actors.errors import BadCheckpoint, CheckpointNotWritten
from actors.trainer.staging import Staged

RANKS = "ranks"  # in every header: how many files there are
SIZES = "sizes"  # and of what is there in part: how large the whole is
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


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


class Shards:
    """What `write_shards` wrote, from however many ranks. Raises BadCheckpoint when files are missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._metadata = _read_headers(directory)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise _bad(directory, error) from error

    def empty(self) -> dict[str, Tensor]:
        """Tensors to read into, whole ones by the names that there are."""
        return {
            name: torch.empty(known.size, dtype=known.properties.dtype)
            for name, known in self._metadata.state_dict_metadata.items()
            if isinstance(known, TensorStorageMetadata)
        }

    def read_into(self, state: Mapping[str, Tensor]) -> None:
        """Fill tensors in place, plain ones whole, DTensors with their shard; all of these names have to be there."""
        reader = _Reader(self._directory, self._metadata)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(dict(state), self._metadata, is_coordinator=True)
            reader.read_data(planner.create_local_plan(), planner)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            raise _bad(self._directory, error) from error


def _bad(directory: Path, error: Exception) -> BadCheckpoint:
    return BadCheckpoint(
        f"{directory} cannot be loaded: {error}; remove that directory to go on from the commit before"
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


class _Reader(StorageReader):
    """Reads the items of a plan, by slices."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self._directory = directory
        self._metadata = metadata

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept from one checkpoint to the next."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with ExitStack() as files:
            opened: dict[str, Any] = {}
            for item in plan.items:
                name, key = self._metadata.storage_data[item.storage_index]
                if name not in opened:
                    opened[name] = files.enter_context(
                        safe_open(self._directory / name, framework="pt")
                    )
                target = planner.resolve_tensor(item).detach()
                target.copy_(_slice(opened[name], key, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _slice(file: Any, key: str, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    if not lengths:
        found: Tensor = file.get_tensor(key)
        return found
    bounds = zip(offsets, lengths, strict=True)
    part: Tensor = file.get_slice(key)[tuple(slice(start, start + n) for start, n in bounds)]
    return part


def _read_headers(directory: Path) -> Metadata:
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, tuple[str, str]] = {}
    for name, key, size, offsets, part in _chunks(directory):
        fqn = key.partition("[")[0]
        known = tensors.setdefault(
            fqn,
            TensorStorageMetadata(TensorProperties(DTYPES[part.get_dtype()]), size, []),
        )
        known.chunks.append(ChunkStorageMetadata(offsets, torch.Size(part.get_shape())))
        places[MetadataIndex(fqn, offsets)] = (name, key)
    return Metadata(dict(tensors), storage_data=places)


def _chunks(directory: Path) -> Iterator[tuple[str, str, torch.Size, torch.Size, Any]]:
    """Of every stored tensor or part of one: file, key, size of the whole, offsets in it, and the slice to read."""
    rank, num_ranks = 0, 1
    while rank < num_ranks:
        name = shard_file(rank)
        with safe_open(directory / name, framework="pt") as file:
            header = file.metadata() or {}
            if RANKS not in header:
                raise ValueError(f"{name} is no shard of a checkpoint")
            num_ranks, sizes = int(header[RANKS]), json.loads(header[SIZES])
            for key in file.keys():
                part = file.get_slice(key)
                size = torch.Size(sizes.get(key, part.get_shape()))
                offsets = json.loads(key[key.index("[") :]) if key in sizes else [0] * len(size)
                yield name, key, size, torch.Size(offsets), part
        rank += 1


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
