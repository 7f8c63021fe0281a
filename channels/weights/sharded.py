"""The ranks of one trainer and their parts of the weights: what each holds, and who writes what into the one file.

A tensor of `TrainingEngine.weights()` is a plain one, which every rank has whole, or a DTensor: this rank's shard of
it, with the layout of all. Nothing is gathered: each rank copies its own parts to where they belong.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from channels.errors import VersionGone
from channels.weights.files import Mappings
from channels.weights.layout import read_layout, views
from channels.weights.shards import Box, Cut, plan, shard, whole, within

if TYPE_CHECKING:
    import torch


class Outline(NamedTuple):
    """A tensor without its elements."""

    dtype: "torch.dtype"
    shape: tuple[int, ...]

    def element_size(self) -> int:
        """Bytes, as torch.Tensor has it."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def outline(tensors: "Mapping[str, torch.Tensor]", dtype: str | None = None) -> dict[str, Outline]:
    """The whole tensors that these, or shards of them, stand for; floating ones in another dtype, if one is named."""
    import torch

    floating: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    return {
        name: Outline(
            floating if floating is not None and tensor.is_floating_point() else tensor.dtype,
            tuple(tensor.shape),
        )
        for name, tensor in tensors.items()
    }


def local(tensor: "torch.Tensor") -> "torch.Tensor":
    """What this rank has of a tensor."""
    found: torch.Tensor = tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return found.detach()


def held(tensor: "torch.Tensor", num_ranks: int) -> tuple[Box, ...]:
    """The box of each rank of the trainer. Raises ValueError for a layout that is not of boxes, or of other ranks."""
    shape = tuple(tensor.shape)
    if not _is_dtensor(tensor):
        return (whole(shape),) * num_ranks
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    boxes = shard(shape, tuple(mesh.mesh.shape), _cuts(tuple(mesh.mesh.shape), placements))
    by_rank = dict(zip(mesh.mesh.flatten().tolist(), boxes, strict=True))
    if sorted(by_rank) != list(range(num_ranks)):
        raise ValueError(
            f"weights on the mesh of ranks {sorted(by_rank)} of a trainer of {num_ranks} ranks: "
            "give a DTensor on a mesh of all ranks, with replicas where they are not divided"
        )
    return tuple(by_rank[rank] for rank in range(num_ranks))


def _is_dtensor(tensor: "torch.Tensor") -> bool:
    # Whoever has one has imported its module, which takes its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _cuts(mesh: tuple[int, ...], placements: tuple[Any, ...]) -> list[Cut]:
    """In the order in which they are made: from the left, but FSDP on top of tensor parallelism within its shards."""
    cuts, inner = [], []
    for axis, placement in enumerate(placements):
        # Of FSDP2 over a dimension that tensor parallelism, further right in the mesh, divides too. Torch keeps the
        # class to itself.
        if type(placement).__name__ == "_StridedShard":
            divided = [
                size
                for other, size in enumerate(mesh)
                if other > axis and placements[other].is_shard(placement.dim)
            ]
            if math.prod(divided) != placement.split_factor:
                raise ValueError(f"weights laid out as {placements} over {mesh} ranks are no boxes")
            inner.append(Cut(axis, placement.dim))
        elif placement.is_shard():
            cuts.append(Cut(axis, placement.dim))
        elif not placement.is_replicate():
            raise ValueError(
                f"weights laid out as {placements}: only shards and replicas are weights; "
                "redistribute partial sums first"
            )
    return [*cuts, *reversed(inner)]


class Parts:
    """Which boxes of each tensor one rank brings to whoever needs all of it; where several have the same, a share."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._planned: tuple[object, dict[str, list[Box]]] | None = (
            None  # for a layout, what is ours
        )

    def of(
        self, tensors: "Mapping[str, torch.Tensor]"
    ) -> "Iterator[tuple[str, Box, torch.Tensor]]":
        """Name, box in the whole tensor, and a view of this rank's tensor that is the box."""
        sources = {name: held(tensor, self.num_ranks) for name, tensor in tensors.items()}
        if self._planned is None or self._planned[0] != sources:
            receivers = {name: (whole(tensor.shape),) for name, tensor in tensors.items()}
            sizes = {name: tensor.element_size() for name, tensor in tensors.items()}
            mine: dict[str, list[Box]] = {}
            for transfer in plan(sources, receivers, sizes):
                if transfer.source == self.rank:
                    mine.setdefault(transfer.name, []).append(transfer.box)
            self._planned = sources, mine
        for name, boxes in self._planned[1].items():
            here, tensor = sources[name][self.rank], local(tensors[name])
            for box in boxes:
                yield name, box, tensor[within(box, here)]


class ShardWriter:
    """Writes one rank's parts of each version. Blocks for the copies: for the worker thread."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self._parts = Parts(rank, num_ranks)
        self._mappings = Mappings(writable=True)

    def write(
        self, into: "Mapping[str, torch.Tensor]", tensors: "Mapping[str, torch.Tensor]"
    ) -> None:
        """Copy this rank's parts of `tensors` into the whole tensors `into`, converted to their dtypes."""
        for name, box, part in self._parts.of(tensors):
            into[name][within(box, whole(into[name].shape))].copy_(part)

    def write_file(self, path: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
        """The same into a version that the leader has begun. Raises VersionGone when it gave it up."""
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError as error:
            raise VersionGone(
                f"{path} is no longer being written: its leader gave it up"
            ) from error
        with file:
            size_bytes = path.stat().st_size
            mapping = self._mappings.get(file, size_bytes)
        with memoryview(mapping) as buffer:
            layout = read_layout(buffer[:size_bytes], path)
        self.write(views(mapping, layout.places), tensors)
        self._mappings.forget_others([path.parent])
