"""Parts of tensors between ranks that hold them in any layout."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from channels.errors import WeightsMismatch
from channels.weights.shards import (
    Box,
    Cut,
    Transfer,
    intersect,
    numel,
    plan,
    shape_of,
    shard,
    subtract,
    whole,
    within,
)

WORKED = (10, 6)


@st.composite
def layouts(draw: Any, shape: tuple[int, ...]) -> tuple[Box, ...]:
    """What the ranks of a mesh of up to two axes hold: whole, rows, columns, both, rows of rows, replicas."""
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    axes = draw(st.permutations(range(len(mesh))))
    dims = st.none() if not shape else st.none() | st.integers(0, len(shape) - 1)
    cuts = [Cut(axis, dim) for axis in axes if (dim := draw(dims)) is not None]
    return shard(shape, mesh, cuts)


@st.composite
def models(draw: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, Any], dict[str, Any]]:
    """Shapes, and what each rank of both sides holds. Every tensor of a side has as many ranks."""
    shapes = draw(
        st.dictionaries(
            st.sampled_from("abcd"),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
            min_size=1,
        )
    )
    sides: list[dict[str, Any]] = []
    for _ in range(2):
        held = {name: draw(layouts(shape)) for name, shape in shapes.items()}
        most = max(map(len, held.values()))
        sides.append({n: boxes * (most // len(boxes) + 1) for n, boxes in held.items()})
    return shapes, sides[0], sides[1]


@settings(max_examples=150, deadline=None)
@given(models())
def test_every_receiver_gets_exactly_its_slices(model: Any) -> None:
    """Bit for bit what slicing the whole tensor gives, each byte once: bytes sent are bytes needed."""
    shapes, sources, receivers = model
    full = {
        name: np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        for name, shape in shapes.items()
    }
    transfers = plan(sources, receivers, dict.fromkeys(shapes, 4))
    for name, boxes in receivers.items():
        times = [np.zeros(shape_of(box), np.int32) for box in boxes]
        got = [np.full(shape_of(box), -1, np.int32) for box in boxes]
        for _, source, receiver, box in (t for t in transfers if t.name == name):
            held = sources[name][source]
            sent = full[name][within(held, whole(shapes[name]))][within(box, held)]
            got[receiver][within(box, boxes[receiver])] = sent
            times[receiver][within(box, boxes[receiver])] += 1
        for rank, box in enumerate(boxes):
            np.testing.assert_array_equal(got[rank], full[name][within(box, whole(shapes[name]))])
            assert (times[rank] == 1).all()
    assert sum(numel(t.box) for t in transfers) == sum(
        numel(box) for boxes in receivers.values() for box in boxes
    )
    assert transfers == plan(sources, receivers, dict.fromkeys(shapes, 4))


@settings(max_examples=100, deadline=None)
@given(st.data(), st.lists(st.integers(1, 5), max_size=3).map(tuple))
def test_what_is_left_of_a_box_and_the_common_part_make_it_up(data: Any, shape: Any) -> None:
    """Every element is in exactly one of them."""
    one, other = (data.draw(layouts(shape))[-1] for _ in range(2))
    count = np.zeros(shape, np.int32)
    common = intersect(one, other)
    for part in (*subtract(one, other), *(() if common is None else (common,))):
        count[within(part, whole(shape))] += 1
    expected = np.zeros(shape, np.int32)
    expected[within(one, whole(shape))] = 1
    np.testing.assert_array_equal(count, expected)


def test_cuts_are_those_of_torch_chunk() -> None:
    """By hand: 10 rows over 4 ranks, a rank that holds nothing, two cuts of the same rows, rows and columns."""
    assert [box[0] for box in shard(WORKED, (4,), [Cut(0, 0)])] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [box[0] for box in shard((5,), (4,), [Cut(0, 0)])] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    rows = [box[0] for box in shard(WORKED, (2, 2), [Cut(1, 0), Cut(0, 0)])]
    assert rows == [(0, 3), (5, 8), (3, 5), (8, 10)], "tensor parallel first, then FSDP within it"
    assert shard(WORKED, (2, 2), [Cut(0, 0), Cut(1, 1)])[1] == ((0, 5), (3, 6))
    assert shard(WORKED, (2, 2), [Cut(1, 1)])[::2] == (((0, 10), (0, 3)),) * 2
    assert shard((), (2,), []) == ((), ())


def test_replicas_share_the_load() -> None:
    """Four ranks with the whole model: none sends more than its part and the largest tensor."""
    shapes = {f"layer.{i}": (3 + i % 5, 40) for i in range(60)}
    sources = {name: shard(shape, (4,), []) for name, shape in shapes.items()}
    receivers = {name: (whole(shape),) for name, shape in shapes.items()}
    sent: Counter[int] = Counter()
    for transfer in plan(sources, receivers, dict.fromkeys(shapes, 2)):
        sent[transfer.source] += numel(transfer.box)
    assert max(sent.values()) - min(sent.values()) <= 7 * 40
    assert sum(sent.values()) == sum(math.prod(shape) for shape in shapes.values())


def test_receivers_that_hold_the_same_get_it_from_one_source() -> None:
    """Which reads it once for all of them."""
    box = whole(WORKED)
    transfers = plan({"w": (box, box)}, {"w": (box, box, box)}, {"w": 2})
    assert transfers == [Transfer("w", 0, receiver, box) for receiver in range(3)]


def test_what_nobody_holds_is_named() -> None:
    """A missing tensor, a missing part, a cut of what is not there."""
    box = whole(WORKED)
    with pytest.raises(WeightsMismatch, match="v is wanted, and no source has it"):
        plan({"w": (box,)}, {"v": (box,)}, {"v": 2})
    with pytest.raises(WeightsMismatch, match=r"w: no source holds \[\(5, 10\), \(0, 6\)\]"):
        plan({"w": (((0, 5), (0, 6)),)}, {"w": (box,)}, {"w": 2})
    with pytest.raises(ValueError, match="no such dimension or axis"):
        shard((), (2,), [Cut(0, 0)])
