"""How tensors are divided over the ranks of each side, and who sends which part to whom. Decides, moves nothing.

A rank holds one box of every tensor: a half-open range along each dimension. All that FSDP, tensor parallelism and
their combinations make are boxes: a whole (or replicated) tensor, rows (`Shard(0)`, column-parallel layers), columns
(`Shard(1)`, row-parallel layers), rows of rows. Each cut is that of `torch.chunk`: parts of ceil(n / parts), of which
the last may be shorter, or empty.

    sources = {"w": shard((1000, 64), mesh=(2, 2), cuts=[Cut(axis=0, dim=0), Cut(axis=1, dim=1)])}
    receivers = {"w": (whole((1000, 64)),)}
    plan(sources, receivers, {"w": 2})     # [Transfer("w", source=0, receiver=0, box=((0, 500), (0, 32))), …]
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from channels.errors import WeightsMismatch

Box = tuple[tuple[int, int], ...]  # one half-open range for each dimension; () is a tensor of none


class Cut(NamedTuple):
    """A dimension of a tensor is divided along an axis of a mesh of ranks."""

    axis: int
    dim: int


class Transfer(NamedTuple):
    """A part of a tensor, in coordinates of the whole tensor, from one rank to another."""

    name: str
    source: int
    receiver: int
    box: Box


def whole(shape: Sequence[int]) -> Box:
    """The box of all of a tensor."""
    return tuple((0, size) for size in shape)


def shard(shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut]) -> tuple[Box, ...]:
    """What each rank of a mesh holds, ranks counted with the last axis fastest.

    cuts: in the order they are made; an axis without one holds replicas. Raises ValueError for one that has no
    dimension to cut.
    """
    for cut in cuts:
        if not (0 <= cut.dim < len(shape) and 0 <= cut.axis < len(mesh)):
            raise ValueError(
                f"{cut} of a tensor of shape {list(shape)} over ranks {list(mesh)}: no such dimension or axis"
            )
    return tuple(_held(shape, mesh, cuts, rank) for rank in product(*map(range, mesh)))


def _held(
    shape: Sequence[int], mesh: Sequence[int], cuts: Sequence[Cut], rank: tuple[int, ...]
) -> Box:
    box = list(whole(shape))
    for axis, dim in cuts:
        start, stop = box[dim]
        part = -(-(stop - start) // mesh[axis])
        first = min(start + rank[axis] * part, stop)
        box[dim] = (first, min(first + part, stop))
    return tuple(box)


def shape_of(box: Box) -> tuple[int, ...]:
    """Of a tensor that is just this box."""
    return tuple(stop - start for start, stop in box)


def numel(box: Box) -> int:
    """Elements in it; 1 for a tensor of no dimension."""
    return math.prod(shape_of(box))


def within(box: Box, held: Box) -> tuple[slice, ...]:
    """Where a box is in the tensor of a rank that holds `held`: an index for torch and numpy."""
    return tuple(
        slice(start - first, stop - first)
        for (start, stop), (first, _) in zip(box, held, strict=True)
    )


def intersect(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None for nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def subtract(box: Box, other: Box) -> Iterator[Box]:
    """What is left of a box without another one, in boxes that do not overlap."""
    common = intersect(box, other)
    if common is None:
        yield box
        return
    left = list(box)
    for dim, ((start, stop), (first, last)) in enumerate(zip(box, common, strict=True)):
        if start < first:
            yield (*left[:dim], (start, first), *left[dim + 1 :])
        if last < stop:
            yield (*left[:dim], (last, stop), *left[dim + 1 :])
        left[dim] = (first, last)


def plan(
    sources: Mapping[str, Sequence[Box]],
    receivers: Mapping[str, Sequence[Box]],
    element_bytes: Mapping[str, int],
) -> list[Transfer]:
    """Bring every receiver exactly what it holds, each byte once, in the order of `receivers`.

    sources, receivers: by name, the box of each rank. Where several sources hold the same, the one with the fewest
    bytes so far sends it; receivers that hold the same get it from one source, which has to read it once. The same
    arguments give the same plan in every process. Raises WeightsMismatch naming what no source holds.
    """
    wanted: list[tuple[int, str, Box, list[int]]] = []
    for name, boxes in receivers.items():
        if name not in sources:
            raise WeightsMismatch(f"{name} is wanted, and no source has it")
        alike: dict[Box, list[int]] = {}
        for rank, box in enumerate(boxes):
            if numel(box):
                alike.setdefault(box, []).append(rank)
        wanted += [
            (numel(box) * element_bytes[name], name, box, ranks) for box, ranks in alike.items()
        ]
    loads = [0] * max((len(boxes) for boxes in sources.values()), default=0)
    found: dict[str, list[Transfer]] = {name: [] for name in receivers}
    # The largest first, as it is done when jobs are to end at the same time on several machines.
    for _, name, box, ranks in sorted(wanted, key=lambda one: -one[0]):
        for source, part in _cover(name, box, sources[name], loads):
            loads[source] += numel(part) * element_bytes[name] * len(ranks)
            found[name] += [Transfer(name, source, receiver, part) for receiver in ranks]
    return [transfer for transfers in found.values() for transfer in transfers]


def _cover(
    name: str, box: Box, sources: Sequence[Box], loads: Sequence[int]
) -> list[tuple[int, Box]]:
    missing, parts = [box], []
    for source in sorted(range(len(sources)), key=lambda rank: (loads[rank], rank)):
        if not missing:
            break
        held = sources[source]
        still: list[Box] = []
        for one in missing:
            part = intersect(one, held)
            if part is not None:
                parts.append((source, part))
            still += subtract(one, held)
        missing = still
    if missing:
        raise WeightsMismatch(f"{name}: no source holds {list(missing[0])} of it")
    return parts
