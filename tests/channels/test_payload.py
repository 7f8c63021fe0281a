"""Payload trees and their bytes."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from channels import payload
from channels.errors import BadFrame
from channels.payload import FRAME_BYTES, Undecodable, register


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A registered class of these tests."""

    xs: Any
    label: str = "none"
    more: dict[str, Any] = field(default_factory=dict)


@register
@dataclass(frozen=True)
class Single:
    """One field: the getter of one name returns no tuple."""

    value: Any


def travel(tree: Any) -> Any:
    """Encode, turn every buffer into received bytes, decode."""
    encoded = payload.encode(tree)
    return payload.decode(encoded.header, [bytearray(buffer) for buffer in encoded.buffers])


def identical(left: Any, right: Any) -> bool:
    """Equality of trees with types, dtypes, shapes and NaNs."""
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return bool(
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, torch.Tensor):
        return bool(
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.contiguous().reshape(-1).view(torch.uint8).tolist()
            == right.contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(identical(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, Point):
        return all(
            identical(getattr(left, name), getattr(right, name)) for name in ("xs", "label", "more")
        )
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    return bool(left == right)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from([np.float32(0.5), np.int64(-3), np.bool_(True), np.datetime64("2024-01-01")])
    | st.builds(
        lambda shape, dtype: np.ones(shape, dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(["f4", ">f8", "i1", "u8", "?", "c16", "M8[ms]", "U3", "S2", "V4"]),
    )
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(-5, 5), inner, max_size=4)
        | st.builds(lambda xs: Point(xs=xs, more={"k": xs}), inner)
        | st.lists(st.builds(lambda xs: Point(xs=xs), inner), max_size=4).map(tuple)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_any_tree_comes_back_as_it_was(tree: Any) -> None:
    """Types included: tuples stay tuples, numpy scalars stay numpy scalars."""
    assert identical(travel(tree), tree)


@pytest.mark.parametrize("length", [3, FRAME_BYTES])
@pytest.mark.parametrize(
    "name",
    [
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    ],
)
def test_numpy_dtypes(name: str, length: int) -> None:
    """In the pack and in frames of their own; empty, 0-dimensional, strided and Fortran-ordered."""
    values = np.random.default_rng(0).integers(0, 2, (2, length)).astype(name)
    tree = [values, values.T, values[:, ::-2], values[0, 0:1].reshape(()), values[:, :0]]
    assert identical(travel(tree), tree)


@pytest.mark.parametrize("length", [3, FRAME_BYTES])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", payload._TORCH_DTYPES)
def test_torch_dtypes(name: str, length: int) -> None:
    """Also bfloat16 and the float8s; transposed, empty, 0-dimensional. What arrives may be written."""
    dtype = getattr(torch, name)
    source = torch.arange(2 * length).reshape(2, length) % 2
    values = source.to(torch.float32 if name == "complex32" else dtype).to(dtype)
    tree = [values, values.t(), values[0, 0], values[:, :0]]
    arrived = travel(tree)
    assert identical(arrived, tree)
    arrived[0].zero_()


def test_records_and_byte_order_survive() -> None:
    """Structured dtypes with nested and shaped fields."""
    dtype = np.dtype([("a", "<i4"), ("b", ">f8", (2,)), ("c", [("d", "S3"), ("e", "?")])])
    record = np.zeros(3, dtype)
    record["b"] = 1.5
    assert identical(travel(record), record)


def test_conjugate_and_gradient_views_arrive_as_values() -> None:
    """Lazy views are resolved, graphs are left behind."""
    lazy = torch.tensor([1 + 2j]).conj()
    needs_grad = torch.ones(2, requires_grad=True) * 2
    arrived = travel([lazy, needs_grad])
    assert arrived[0].tolist() == [1 - 2j]
    assert arrived[1].tolist() == [2.0, 2.0]
    assert not arrived[1].requires_grad


def test_large_contiguous_arrays_are_not_copied() -> None:
    """The frame is the array's own memory, and the decoded array is the received memory."""
    array = np.arange(FRAME_BYTES, dtype=np.int64)
    tensor = torch.arange(FRAME_BYTES)
    encoded = payload.encode({"array": array, "tensor": tensor})
    assert len(encoded.frames) == 2
    assert np.shares_memory(np.frombuffer(encoded.frames[0], np.uint8), array)
    received = [bytearray(buffer) for buffer in encoded.buffers]
    decoded = payload.decode(encoded.header, received)
    received[1][0] = received[2][0] = 77
    assert decoded["array"][0] == 77
    assert decoded["tensor"][0] == 77


def test_small_arrays_share_one_aligned_pack() -> None:
    """No frame per small array, and each begins where its dtype may be read fast."""
    encoded = payload.encode([np.ones(n, np.float64) for n in range(50)])
    assert not encoded.frames
    decoded = payload.decode(encoded.header, [bytearray(encoded.pack)])
    assert all(array.flags.aligned for array in decoded)


def test_encoded_trees_nest_and_one_bad_tree_spares_its_neighbours() -> None:
    """A batch is made of items encoded earlier; one that cannot be read is marked, not fatal."""
    good = payload.encode({"x": np.arange(5), "big": np.arange(FRAME_BYTES)})
    bad = payload.Encoded(b"\xc1", b"", [])
    first, second, third = travel([good, bad, payload.encode((good,))])
    assert identical(first, {"x": np.arange(5), "big": np.arange(FRAME_BYTES)})
    assert isinstance(second, Undecodable)
    assert identical(third[0], first)


def test_registered_class_with_fewer_fields_gets_its_defaults() -> None:
    """An older sender does not know the new last fields."""
    header = msgpack.packb(
        {msgpack.ExtType(1, f"{__name__}.Point".encode()): [[1, 2]]}, strict_types=True
    )
    assert payload.decode(header) == Point(xs=[1, 2])
    assert travel(Single(value=(1,))) == Single(value=(1,))


def test_rows_of_a_class_travel_as_columns() -> None:
    """What all rows share is sent once, ragged arrays are packed; every row arrives as it was."""
    shared = "a prompt that all samples of a group have in common " * 20
    rows = tuple(
        Point(
            xs=np.arange(n, dtype=np.int32),
            label=shared,
            more={"turns": (Point(xs=float(n)), Point(xs=np.ones((n, 2))))},
        )
        for n in range(40)
    )
    encoded = payload.encode(rows)
    assert len(encoded.header) < 2 * len(shared) + 100 * len(rows)
    assert identical(travel(rows), rows)
    assert identical(travel(Single(value=rows)).value, rows)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, -0.0),
        (1, True, 1.0),
        (float("nan"),) * 3,
        ("a", "a", None),
        ((), ()),
        ((Single(1),), (Single(1), Single(2)), ()),
        ((Single(1),), (2,)),
        ((Point(xs=(1,)),), (Point(xs=(1.0,)),)),
        (np.zeros(0, np.int8), np.zeros(3, np.int8)),
        (np.zeros(2, np.int8), np.zeros(2, np.int16)),
        (np.zeros(2), np.zeros((2, 2))),
        (np.array(1.0), np.array(2.0)),
        (np.zeros(2), np.array(2.0)),
        (np.ones((3, 2)), np.zeros((1, 2)), np.zeros((0, 2))),
        (np.ones((3, 2)), np.zeros((3, 1))),
        (np.arange(6).reshape(2, 3).T, np.arange(9)[::3, None] * [1, 2]),
        (np.arange(3), np.ma.masked_array([1, 2, 3]).data[::-1]),
        (np.zeros(0), np.zeros(0)),
        (np.arange(FRAME_BYTES // 8 - 1), np.arange(FRAME_BYTES // 8 - 2)),
        ((Single("a"), Single("b")), (Single("a"), Single("b"))),
        ((Single("a"), Single("a")), (Single("a"),)),
        ((Single(1),), (Single(True),)),
        (("a", 1), ("a", True)),
        (np.zeros(2 * FRAME_BYTES), np.zeros(1)),
        (np.zeros(2, ">f8"), np.ones(2, ">f8")),
        (np.zeros(1, "S0"), np.zeros(1, "S0")),
        (torch.ones(2), torch.ones(3)),
        ({}, {"a": 1}),
        ([Single(1)], [Single(1)]),
    ],
)
def test_a_column_keeps_every_bit_and_type(values: tuple[Any, ...]) -> None:
    """Equal is not the same: -0.0, True and 1.0 stay what they are."""
    arrived = travel(tuple(Single(value) for value in values))
    assert [type(row) for row in arrived] == [Single] * len(values)
    for row, value in zip(arrived, values, strict=True):
        assert repr(row.value) == repr(value)


def test_small_arrays_of_all_rows_are_one_and_large_ones_are_not_copied() -> None:
    """Packed where that is cheaper; a large array keeps its own memory, whatever its neighbours are."""
    small = tuple(Single(np.full((n, 4), n, np.float32)) for n in range(3))
    encoded = payload.encode(small)
    assert len(encoded.pack) == sum(row.value.nbytes for row in small)
    large = np.zeros(FRAME_BYTES, np.uint8)
    (frame,) = payload.encode((Single(np.zeros(1, np.uint8)), Single(large))).frames
    assert isinstance(frame, memoryview)
    assert np.shares_memory(np.frombuffer(frame, np.uint8), large)


@register
@dataclass(frozen=True, slots=True)
class Positive:
    """Checks what it is made of."""

    value: int
    note: str = ""

    def __post_init__(self) -> None:
        if self.value < 1:
            raise ValueError(f"{self.value} is not positive")


@pytest.mark.parametrize("values", [(1, -1), (-1, -1), (-1,)])
def test_checks_of_a_constructor_apply_to_every_row(values: tuple[int, ...]) -> None:
    """Only constructors that check nothing are passed by."""
    rows = tuple(Positive(1, str(value)) for value in values)
    for row, value in zip(rows, values, strict=True):
        object.__setattr__(row, "value", value)
    with pytest.raises(BadFrame, match="not positive"):
        travel(rows)
    good = (Positive(1, "a"), Positive(2, "b"))
    assert travel(good) == good


def table_header(*table: Any) -> bytes:
    """The header of a table of Points with these contents."""
    packed: bytes = msgpack.packb({msgpack.ExtType(8, f"{__name__}.Point".encode()): list(table)})
    return packed


def test_only_frozen_dataclasses_can_be_registered_and_names_are_unique() -> None:
    """Registration says what is wrong at once."""

    @dataclass
    class Loose:
        x: int

    @dataclass(frozen=True)
    class Double:
        x: int

    with pytest.raises(TypeError, match="frozen"):
        register(Loose)
    with pytest.raises(TypeError, match="frozen"):
        register(int)
    register(Double, "test.double")
    with pytest.raises(ValueError, match="belongs to"):
        register(dataclass(frozen=True)(type("Other", (), {})), "test.double")


class Opaque:
    """Not registered."""


def deep(levels: int) -> list[Any]:
    """A list in a list in a list."""
    tree: list[Any] = []
    for _ in range(levels):
        tree = [tree]
    return tree


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"a": [Opaque()]}, "Opaque: register"),
        ({1, 2}, "set"),
        (np.array([object()]), "object"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (deep(5000), "recursion"),
    ],
)
def test_what_cannot_travel_is_a_type_error_at_the_sender(tree: Any, reason: str) -> None:
    """The error names the type and the way out."""
    with pytest.raises(TypeError, match=reason):
        payload.encode(tree)


def array_header(code: int, shape: tuple[int, ...], frame: int, offset: int) -> bytes:
    """The header of one array with these claims."""
    place = payload._PLACES[len(shape)].pack(code, len(shape), frame, offset, *shape)
    packed: bytes = msgpack.packb(msgpack.ExtType(3, place))
    return packed


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000 + b"\xc0",
        msgpack.packb([1]) + b"\x00",
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb(msgpack.ExtType(99, b"")),
        msgpack.packb({msgpack.ExtType(1, b"os.system"): ["true"]}),
        msgpack.packb({msgpack.ExtType(1, f"{__name__}.Point".encode()): [1, "a", {}, 4]}),
        msgpack.packb({msgpack.ExtType(1, f"{__name__}.Point".encode()): []}),
        msgpack.packb({msgpack.ExtType(2, b""): 5}),
        array_header(4, (100,), 0, 0),
        array_header(4, (2**62, 2**62), 0, 0),
        array_header(4, (1,), 7, 0),
        array_header(4, (1,), 0, 2**63),
        array_header(200, (1,), 0, 0),
        msgpack.packb(msgpack.ExtType(3, b"\x01")),
        msgpack.packb(msgpack.ExtType(3, b"")),
        msgpack.packb(msgpack.ExtType(4, b"\x01")),
        msgpack.packb(msgpack.ExtType(5, b"\x01\x01\x01")),
        msgpack.packb(msgpack.ExtType(7, b"\x01")),
        table_header(),
        table_header(2**40, [0, 1]),
        table_header(0, [0, 1]),
        table_header("two", [0, 1]),
        table_header(2, 5),
        table_header(2, [0]),
        table_header(2, [1, [1]]),
        table_header(2, [1, 5]),
        table_header(2, [1, {"a": 1, "b": 2}]),
        table_header(2, [2, [1, 2], 4]),
        table_header(2, [2, [1, 2], 4, 0, 0]),
        table_header(2, [2, [1, 1], 4, 0, 8]),
        table_header(2, [2, [1, 1], 4, 0, -8]),
        table_header(2, [2, [1, 1], 1, -1, 0]),
        table_header(2, [2, [1, 1], 99, 0, 0]),
        table_header(2, [2, [1, 1], 1, 0, 0, 2**40]),
        table_header(2, [2, [1, 1], 1, 0, 0, -1]),
        table_header(2, [2, [-1, 3], 1, 0, 0]),
        table_header(2, [2, [1], 1, 0, 0]),
        table_header(2, [2, [], 1, 0, 0]),
        table_header(2, [2, 2, 1, 0, 0]),
        table_header(2, [3, [1, 2], [1, 2]]),
        table_header(2, [3, [-1, 3], [1, 2]]),
        table_header(2, [3, [1, 1], 7]),
        table_header(2, [9, [1, 2]]),
        table_header(2, [1, [1, 2]], [0, ""], [0, {}], [0, 1]),
        msgpack.packb({msgpack.ExtType(8, b"os.system"): [2, [0, "true"]]}),
        msgpack.packb(
            msgpack.ExtType(3, payload._PLACES[1].pack(255, 1, 0, 0, 1) + msgpack.packb("|O"))
        ),
    ],
)
def test_bytes_that_are_no_payload_are_a_bad_frame(header: bytes) -> None:
    """Whatever comes, there is one error class: no crash, no code run, no reading outside a buffer."""
    with pytest.raises(BadFrame):
        payload.decode(header, [bytearray(16)])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    """Flipped bytes decode to something or are a BadFrame."""
    encoded = payload.encode(
        [
            {"a": np.arange(4), "b": (1, 2**70)},
            Point(xs=torch.ones(2)),
            np.float32(1),
            tuple(Point(xs=np.arange(n), more={"p": (Single(n), Single(2))}) for n in range(3)),
        ]
    )
    header = bytearray(encoded.header)
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        payload.decode(bytes(header), [bytearray(encoded.pack)])
    except BadFrame:
        pass


def test_torch_is_imported_only_for_tensors_and_its_absence_is_explained() -> None:
    """An env actor without torch handles arrays, and says what it misses when a tensor comes."""
    header = payload.encode(torch.ones(2)).header
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from channels import payload\n"
        "encoded = payload.encode({'a': np.ones(3)})\n"
        "payload.decode(encoded.header, encoded.buffers)\n"
        f"try: payload.decode({header!r}, [bytes(16)])\n"
        "except payload.BadFrame as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "this interpreter has no torch" in done.stdout


@pytest.mark.parametrize(
    "tree", [None, "x" * 1000, {"a": np.arange(5)}, [np.zeros(20_000), np.ones(3), "text"]]
)
def test_list_of_one_encoded_tree_is_encoded_like_a_longer_one(tree: Any) -> None:
    """The short cut for what a channel sends as a rule: its first element is what it is among two."""
    encoded = payload.encode(tree)
    one, two = payload.encode([encoded]), payload.encode([encoded, encoded])
    (alone,) = payload.decode(one.header, one.buffers)
    among, _ = payload.decode(two.header, two.buffers)
    assert repr(alone) == repr(among) == repr(tree)


def test_failed_encoding_leaves_nothing_behind() -> None:
    """Encoders are used again: after a failure nothing of its tree, and no half of it, is in the next."""
    kept = payload.encode([1, np.arange(3)])
    with pytest.raises(TypeError, match="cannot hold"):
        payload.encode(["left", np.arange(9), object()])
    again = payload.encode([1, np.arange(3)])
    assert (again.header, again.pack) == (kept.header, kept.pack)
