"""Free-form payload trees, as a MessagePack header, one pack of small arrays, and a frame per large
array.

A tree is made of dict, list, tuple, str, bytes, int, float, bool, None, numpy arrays and scalars of
every dtype but object, torch tensors, and dataclasses that were registered. Nothing is ever
unpickled, and classes are found by their registered name only. The header holds, in the place of an
array, its dtype, shape and where its bytes are.

* Arrays below FRAME_BYTES are copied into the pack, 16-byte aligned; larger ones that are
  contiguous are not copied, so they must not be changed until the receiver has acknowledged them.
  Non-contiguous ones are copied.
* A tuple of several instances of one registered class travels as columns, field by field, and so do the instances
  in these fields: what all rows share once, small arrays that differ in their first dimension at most one after
  another with their lengths. Decoded rows that are equal in every field may be one object.
* Decoded numpy arrays are views on the received buffers and hold them alive; whether they may be
  written is not promised. Decoded torch tensors are on the CPU and writable; torch is imported only
  when a tensor occurs.
"""

import dataclasses
import itertools
import math
import operator
import struct
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import msgpack
import numpy as np

from channels.errors import BadFrame

FRAME_BYTES = 16 * 1024  # below it, a copy is cheaper than one more frame on a socket
KEPT_HEADER_BYTES = 1 << 20  # an encoder that has grown beyond is not used again
MAX_NESTING = 4  # of encoded trees in encoded trees
MAX_ROWS = 1 << 20  # of one table of columns

# Runs an iterator to its end, at the interpreter's own speed.
_exhaust = deque[Any](maxlen=0).extend

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

_CLASS, _TUPLE, _ARRAY, _SCALAR, _TENSOR, _BIG_INT, _ENCODED, _TABLE = range(1, 9)
# Kinds of columns: one value for all rows, a value for each, packed arrays, packed tuples.
_SHARED, _EACH, _ARRAYS, _TUPLES = range(4)
_kind_of = operator.itemgetter(0)  # of a column; _SHARED is the one that is false

# Positions in these tables are the wire format: append only.
_NUMPY_DTYPES = tuple(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
_TORCH_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128", "bfloat16", "complex32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_OTHER_DTYPE = 255  # its description follows the shape
_NUMPY_CODES = {dtype: code for code, dtype in enumerate(_NUMPY_DTYPES)}
# Equal means the same, among values of one such type.
_ATOMS = frozenset({str, int, bool, bytes, type(None)})
_PADDING = tuple(bytes((-n) % 16) for n in range(16))  # by length modulo 16
# dtype code, dimensions, frame (0 is the pack), offset, shape
_PLACES = tuple(struct.Struct(f"<BBIQ{ndim}Q") for ndim in range(65))
_PLACE_1D = _PLACES[1]
_LIST_OF_LONG = struct.Struct(">BBIB")  # MessagePack: a list of one, an extension of any length
_NESTED = struct.Struct("<QQII")  # offset and length in the pack, first frame and number of frames


class SharedFrame(Protocol):
    """A frame in memory that its receivers may reach themselves, see `channels.tensors`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def view(self) -> memoryview:
        """The bytes, for receivers that cannot."""
        ...


DeviceFrameOf = Callable[[Any], SharedFrame | None]  # of a torch tensor


@dataclass(slots=True, eq=False)  # not frozen: that would make each three times as expensive
class Encoded:
    """An encoded tree. It may itself stand in a tree, and is then decoded in its place. Never changed."""

    header: bytes
    pack: bytes
    frames: Sequence[memoryview | SharedFrame]

    @property
    def size_bytes(self) -> int:
        """Bytes of header, pack and frames."""
        size = len(self.header) + len(self.pack)
        return size + sum([f.nbytes for f in self.frames]) if self.frames else size

    @property
    def buffers(self) -> list[Buffer]:
        """What travels beside the header: nothing, or the pack and then the bytes of the frames."""
        if not self.pack and not self.frames:
            return []
        views = [f if isinstance(f, memoryview) else f.view for f in self.frames]
        return [self.pack, *views]


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands where an `Encoded` subtree was that cannot be decoded here."""

    error: BadFrame


class _Registered:
    """A dataclass that may travel: as the list of its fields, in order."""

    def __init__(self, cls: type, name: str) -> None:
        self.cls, self.name = cls, name
        self.fields = tuple(f.name for f in dataclasses.fields(cls))
        self.marker = msgpack.ExtType(_CLASS, name.encode())
        self.table_marker = msgpack.ExtType(_TABLE, name.encode())
        self.table = _Table(self)
        self.values: Callable[[Any], Sequence[Any]]
        if len(self.fields) > 1:
            self.values = operator.attrgetter(*self.fields)
        else:
            self.values = lambda value: [getattr(value, name) for name in self.fields]
        self._setters = _setters(cls, self.fields)

    def columns(self, rows: Sequence[Any]) -> Iterable[tuple[Any, ...]]:
        """What instances have in each field."""
        return zip(*map(self.values, rows), strict=True)

    def make(self, values: Any) -> Any:
        if type(values) is not list or len(values) > len(self.fields):
            raise BadFrame(f"{self.name} has the fields {self.fields}, received {values!r:.200}")
        if self._setters is None or len(values) != len(self._setters):
            return self.cls(**dict(zip(self.fields, values, strict=False)))
        made: Any = object.__new__(self.cls)
        for put, value in zip(self._setters, values, strict=True):
            put(made, value)
        return made

    def make_rows(
        self, table: Any, values_of: Callable[[Any, int], Sequence[Any]]
    ) -> tuple[Any, ...]:
        """The instances of a table: the number of rows, then a column for each field.

        values_of: gives the values of a column that its rows do not share, for a number of rows
        """
        if type(table) is not list or not table or type(table[0]) is not int:
            raise BadFrame(f"a table of {self.name} starts with its rows, received {table!r:.200}")
        count, *columns = table
        if not 0 < count <= MAX_ROWS or len(columns) > len(self.fields):
            raise BadFrame(
                f"a table of {self.name} has up to {MAX_ROWS} rows and {len(self.fields)} columns, "
                f"received {count} and {len(columns)}"
            )
        if not any(map(_kind_of, columns)):
            row = self.make([column[1] for column in columns])
            return tuple(itertools.repeat(row, count))
        cls, setters = self.cls, self._setters
        values = [
            itertools.repeat(column[1], count) if column[0] == _SHARED else values_of(column, count)
            for column in columns
        ]
        if setters is None or len(columns) != len(setters):
            fields = self.fields[: len(columns)]
            return tuple(
                [cls(**dict(zip(fields, row, strict=True))) for row in zip(*values, strict=True)]
            )
        new = object.__new__
        rows: tuple[Any, ...] = tuple([new(cls) for _ in range(count)])
        for put, column in zip(setters, values, strict=True):
            _exhaust(map(put, rows, column))
        return rows


def _setters(cls: type, fields: Sequence[str]) -> list[Callable[[Any, Any], None]] | None:
    """What puts each field into an instance, where a constructor does nothing else; None for other classes.

    So instances are made in a third of the time that calls of the constructor take.
    """
    generated: bool = cls.__dataclass_params__.init  # type: ignore[attr-defined]
    own_new = any("__new__" in base.__dict__ for base in cls.__mro__[:-1])
    if not generated or own_new or hasattr(cls, "__post_init__"):
        return None
    slots = [getattr(cls, field, None) for field in fields]
    setters = [slot.__set__ for slot in slots if isinstance(slot, types.MemberDescriptorType)]
    return setters if len(setters) == len(fields) else None


class _Table(NamedTuple):
    """Marks a decoded map as the table of a class."""

    registered: _Registered


_classes: dict[type, _Registered] = {}
_names: dict[bytes, _Registered] = {}


def register(cls: type[T], name: str | None = None) -> type[T]:
    """Let a dataclass travel in payloads, under a name that is the same on both sides. Usable as a
    decorator.

    name: by default the class's module and qualified name. New fields come last with defaults. The
    constructor runs at the receiver, so checks in `__post_init__` apply there too.
    """
    parameters = getattr(cls, "__dataclass_params__", None)
    if not dataclasses.is_dataclass(cls) or parameters is None or not parameters.frozen:
        # In one process payloads travel by reference, so a change would be seen by the sender.
        raise TypeError(
            f"{cls.__qualname__} is not a frozen dataclass: declare it with frozen=True"
        )
    hidden = [f.name for f in dataclasses.fields(cls) if not f.init]
    if hidden:
        raise TypeError(
            f"{cls.__qualname__} has fields {hidden} outside its constructor: it cannot be remade"
        )
    registered = _Registered(cls, name or f"{cls.__module__}.{cls.__qualname__}")
    other = _names.get(registered.marker.data)
    if other is not None and other.cls is not cls:
        raise ValueError(
            f'the name "{registered.name}" belongs to {other.cls!r}: give another name'
        )
    _classes[cls] = _names[registered.marker.data] = registered
    return cls


def encode(tree: Any, device_frame: DeviceFrameOf | None = None) -> Encoded:
    """Encode a payload tree. Raises TypeError, naming the type, for what cannot travel.

    device_frame: gives the frame of a tensor that is to stay on its device, None for others; these
    are copied to the host.
    """
    if type(tree) is list and len(tree) == 1 and type(tree[0]) is Encoded:
        return _list_of(tree[0])
    try:
        encoder = _idle.pop()  # in one step: several threads encode
    except IndexError:
        encoder = _Encoder()
    try:
        header: bytes = encoder.begin(device_frame).pack(tree)
        encoded = Encoded(header, b"".join(encoder.pack), encoder.frames)
    except (ValueError, RecursionError) as error:
        raise TypeError(f"the payload cannot be encoded: {error}") from error
    finally:
        encoder.begin(None)  # it keeps nothing alive
    if len(header) <= KEPT_HEADER_BYTES:
        _idle.append(encoder)
    return encoded


def _list_of(encoded: Encoded) -> Encoded:
    """What encoding a list of this one gives: what a channel sends as a rule, without an encoder."""
    place = _NESTED.pack(0, len(encoded.pack), 0, len(encoded.frames))
    size = len(place) + len(encoded.header)
    if size < 256:
        head = bytes((0x91, 0xC7, size, _ENCODED))
    else:
        head = _LIST_OF_LONG.pack(0x91, 0xC9, size, _ENCODED)
    return Encoded(head + place + encoded.header, encoded.pack, encoded.frames)


def decode(header: Buffer, buffers: Sequence[Buffer] = (), nesting: int = 0) -> Any:
    """Decode what `encode` made: header and `buffers`. Raises BadFrame for anything else."""
    decoder = _Decoder(buffers, nesting)
    try:
        return msgpack.unpackb(
            header,
            ext_hook=decoder.extension,
            object_hook=decoder.mapping,
            strict_map_key=False,
            unicode_errors="surrogatepass",
        )
    except BadFrame:
        raise
    except (
        Exception
    ) as error:  # whatever bytes from outside provoke in msgpack, numpy or a constructor
        raise BadFrame(f"not a payload: {type(error).__name__}: {error}") from error


class _Encoder:
    """Turns what MessagePack does not know into what it knows, and collects the bytes of arrays."""

    __slots__ = ("device_frame", "frames", "pack", "pack_size", "packer")

    def __init__(self) -> None:
        self.packer = msgpack.Packer(
            default=self.default, strict_types=True, unicode_errors="surrogatepass", buf_size=4096
        )

    def begin(self, device_frame: DeviceFrameOf | None) -> Any:
        """Start with nothing collected. Returns the packer."""
        self.device_frame = device_frame
        self.pack: list[bytes] = []
        self.pack_size = 0
        self.frames: list[memoryview | SharedFrame] = []
        return self.packer

    def default(self, value: Any) -> Any:
        cls = type(value)
        if cls is np.ndarray:
            return self._array(value)
        registered = _classes.get(cls)
        if registered is not None:
            return {registered.marker: list(registered.values(value))}
        if cls is tuple:
            registered = _row_class(value)
            if registered is None:
                return {_TUPLE_MARKER: list(value)}
            return self._table(registered, value)
        if cls is Encoded:
            return self._encoded(value)
        if isinstance(value, np.generic):
            return self._scalar(value)
        if cls is int:
            return msgpack.ExtType(
                _BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            )
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            return self._tensor(torch, value)
        raise TypeError(
            f"a payload cannot hold a {cls.__module__}.{cls.__qualname__}: register the dataclass "
            "with channels.payload.register, or send dicts, lists, numbers, text and arrays"
        )

    def _table(self, registered: _Registered, rows: Sequence[Any]) -> dict[Any, Any]:
        columns = map(self._column, registered.columns(rows))
        return {registered.table_marker: [len(rows), *columns]}

    def _column(self, values: tuple[Any, ...]) -> list[Any]:
        """A column of a table, from the values of all rows."""
        first = values[0]
        cls = type(first)
        # Looking at the last one first spares most columns the rest.
        if first is values[-1] and len(set(map(id, values))) == 1:
            return [_SHARED, first]
        if len(set(map(type, values))) > 1:
            return [_EACH, list(values)]
        if cls is np.ndarray:
            return self._arrays(values) or [_EACH, list(values)]
        if cls in _ATOMS:
            return [_SHARED, first] if values.count(first) == len(values) else [_EACH, list(values)]
        if cls is tuple:
            return self._tuples(values)
        registered = _classes.get(cls)
        return self._instances(registered, values) if registered else [_EACH, list(values)]

    def _instances(self, registered: _Registered, values: tuple[Any, ...]) -> list[Any]:
        columns = list(map(self._column, registered.columns(values)))
        if not any(map(_kind_of, columns)):
            return [_SHARED, {registered.marker: [column[1] for column in columns]}]
        return [_EACH, {registered.table_marker: [len(values), *columns]}]

    def _tuples(self, values: tuple[Any, ...]) -> list[Any]:
        lengths = list(map(len, values))
        length = lengths[0] if len(set(lengths)) == 1 else None  # of each of them
        rows = tuple(itertools.chain.from_iterable(values))
        registered = _row_class(rows)
        if length is not None and (registered is None or length > 1) and _same(values):
            return [_SHARED, values[0]]
        if registered is None:
            return [_EACH, list(values)]
        kind, content = self._instances(registered, rows)
        if kind == _EACH:
            return [_TUPLES, lengths, content]
        if length is not None:
            return [_SHARED, {_TUPLE_MARKER: [content] * length}]
        return [_TUPLES, lengths, self._table(registered, rows)]

    def _arrays(self, arrays: Sequence[Any]) -> list[Any] | None:
        """A column of arrays that are small, and alike in all but the first dimension; None for others."""
        first = arrays[0]
        dtype, rest = first.dtype, first.shape[1:]
        code = _NUMPY_CODES.get(dtype)
        if code is None or [array.dtype for array in arrays].count(dtype) < len(arrays):
            return None
        shapes = [array.shape for array in arrays]
        if shapes.count(first.shape) < len(shapes) and {shape[1:] for shape in shapes} != {rest}:
            return None
        if not all(shapes):  # () has no first dimension
            return None
        lengths = [shape[0] for shape in shapes]
        if max(lengths) * math.prod(rest) * dtype.itemsize >= FRAME_BYTES:
            return None
        try:
            data = b"".join(arrays)
        except TypeError:  # some of them are not contiguous
            data = b"".join([array.tobytes() for array in arrays])
        frame, offset = self._put(data)
        return [_ARRAYS, lengths, code, frame, offset, *rest]

    def _array(self, array: Any) -> Any:
        code = _NUMPY_CODES.get(array.dtype, _OTHER_DTYPE)
        if array.nbytes < FRAME_BYTES:
            frame, offset = 0, self._append(array.tobytes())
        else:
            flat = np.ascontiguousarray(array).reshape(-1)
            # A view as bytes also serves dtypes that have no buffer protocol, such as datetime64.
            frame, offset = self._frame(flat.view(np.uint8).data), 0
        if array.ndim == 1 and code != _OTHER_DTYPE:
            return msgpack.ExtType(_ARRAY, _PLACE_1D.pack(code, 1, frame, offset, array.shape[0]))
        place = _PLACES[array.ndim].pack(code, array.ndim, frame, offset, *array.shape)
        return msgpack.ExtType(_ARRAY, place + _description(array.dtype, code))

    def _scalar(self, value: Any) -> Any:
        code = _NUMPY_CODES.get(value.dtype, _OTHER_DTYPE)
        description = _description(value.dtype, code)
        head = struct.pack("<BI", code, len(description))
        return msgpack.ExtType(_SCALAR, head + description + value.tobytes())

    def _tensor(self, torch: Any, tensor: Any) -> Any:
        name = str(tensor.dtype).removeprefix("torch.")
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise TypeError(
                f"a payload holds plain dense tensors, not a {type(tensor).__qualname__} "
                f"with layout {tensor.layout}: send its local or full tensor"
            )
        if name not in _TORCH_DTYPES:
            raise TypeError(f"a payload cannot hold a tensor of {tensor.dtype}: convert it first")
        code, ndim = _TORCH_DTYPES.index(name), tensor.ndim
        on_device = None if self.device_frame is None else self.device_frame(tensor)
        if on_device is not None:
            self.frames.append(on_device)
            place = _PLACES[ndim].pack(code, ndim, len(self.frames), 0, *tensor.shape)
            return msgpack.ExtType(_TENSOR, place)
        dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = memoryview(dense.view(torch.uint8).numpy())
        if data.nbytes < FRAME_BYTES:
            frame, offset = 0, self._append(data.tobytes())
        else:
            frame, offset = self._frame(data), 0
        return msgpack.ExtType(
            _TENSOR, _PLACES[ndim].pack(code, ndim, frame, offset, *tensor.shape)
        )

    def _encoded(self, encoded: Encoded) -> Any:
        offset = self._append(encoded.pack)
        first = len(self.frames)
        self.frames.extend(encoded.frames)
        place = _NESTED.pack(offset, len(encoded.pack), first, len(encoded.frames))
        return msgpack.ExtType(_ENCODED, place + encoded.header)

    def _append(self, data: bytes) -> int:
        offset = self.pack_size
        size = len(data)
        self.pack.append(data)
        padding = _PADDING[size & 15]
        if padding:
            self.pack.append(padding)
        self.pack_size = offset + size + len(padding)
        return offset

    def _put(self, data: bytes) -> tuple[int, int]:
        """Copies of arrays, in the pack or as a frame: which, and where in it."""
        if len(data) < FRAME_BYTES:
            return 0, self._append(data)
        return self._frame(memoryview(data)), 0

    def _frame(self, data: memoryview) -> int:
        self.frames.append(data)
        return len(self.frames)  # 0 is the pack


_idle: list[_Encoder] = []  # making one costs more than encoding a small tree


class _Rows(NamedTuple):
    """Where the rows of a column lie that are packed one after another."""

    lengths: Sequence[int]
    slices: Sequence[slice]
    stop: int


_NO_ROWS = _Rows([], [], 0)


class _Decoder:
    """Puts arrays and registered classes back into the tree, after checking every place against the
    buffers."""

    __slots__ = ("buffers", "nesting", "rows")

    def __init__(self, buffers: Sequence[Buffer], nesting: int) -> None:
        self.buffers = buffers
        self.nesting = nesting
        self.rows = _NO_ROWS

    def extension(self, code: int, data: bytes) -> Any:
        if code == _ARRAY:
            return self._array(data)
        if code == _CLASS:
            return _registered(data)
        if code == _TUPLE:
            return _tuple_mark
        if code == _TABLE:
            return _registered(data).table
        if code == _TENSOR:
            return self._tensor(data)
        if code == _SCALAR:
            return _scalar(data)
        if code == _ENCODED:
            return self._nested(data)
        if code == _BIG_INT:
            return int.from_bytes(data, "little", signed=True)
        raise BadFrame(f"unknown extension {code} in a payload")

    def mapping(self, value: dict[Any, Any]) -> Any:
        """Undo the one-entry maps that stand for dataclasses, tables and tuples."""
        if len(value) == 1:
            ((key, content),) = value.items()
            if type(key) is _Registered:
                return key.make(content)
            if type(key) is _Table:
                return key.registered.make_rows(content, self._column)
            if key is _tuple_mark:
                return tuple(content)
        return value

    def _column(self, column: Any, count: int) -> Sequence[Any]:
        """A column's value for each of `count` rows, unless they share it."""
        kind = column[0]
        if kind == _EACH:
            values: Sequence[Any] = column[1]
        elif kind in (_ARRAYS, _TUPLES):
            rows = self._rows_of(column[1])
            packed = column[2] if kind == _TUPLES else self._joined(rows.stop, *column[2:])
            if len(packed) != rows.stop:
                raise BadFrame(f"rows of {rows.stop} in all were packed, received {len(packed)}")
            values = list(map(packed.__getitem__, rows.slices))
        else:
            raise BadFrame(f"unknown kind {kind!r:.20} of a column")
        if type(values) not in (list, tuple) or len(values) != count:
            raise BadFrame(f"a column of {len(values)} values in a table of {count} rows")
        return values

    def _rows_of(self, lengths: list[int]) -> "_Rows":
        """Where rows of these lengths lie. Several columns of a table have the same as a rule."""
        if lengths != self.rows.lengths:
            ends = list(itertools.accumulate(lengths))
            if min(lengths) < 0:
                raise BadFrame(f"rows of {lengths!r:.100}")
            self.rows = _Rows(lengths, list(map(slice, [0, *ends], ends)), ends[-1])
        return self.rows

    def _joined(self, length: int, code: int, frame: int, offset: int, *rest: int) -> Any:
        """The arrays of a column, one after another."""
        if frame < 0 or offset < 0:
            raise BadFrame(f"arrays lie at {offset} of buffer {frame}")
        dtype, shape = _NUMPY_DTYPES[code], (length, *rest)
        buffer = self._buffer(frame, offset, math.prod(shape) * dtype.itemsize)
        return np.ndarray(shape, dtype, buffer, offset)

    def _array(self, data: bytes) -> Any:
        if len(data) == _PLACE_1D.size and data[1] == 1:
            code, _, frame, offset, length = _PLACE_1D.unpack(data)
            shape: tuple[int, ...] = (length,)
            rest = b""
        else:
            code, shape, frame, offset, rest = _unpack_place(data)
        dtype = _described(rest) if code == _OTHER_DTYPE else _NUMPY_DTYPES[code]
        buffer = self._buffer(frame, offset, math.prod(shape) * dtype.itemsize)
        return np.ndarray(shape, dtype, buffer, offset)

    def _tensor(self, data: bytes) -> Any:
        try:
            import torch
        except ImportError as error:
            raise BadFrame(
                "the payload holds a torch tensor and this interpreter has no torch: "
                "install it for this stage, or send numpy arrays"
            ) from error
        code, shape, frame, offset, _ = _unpack_place(data)
        dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[code])
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffer(frame, offset, nbytes)
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        if isinstance(buffer, torch.Tensor):  # on a device
            return buffer[offset : offset + nbytes].view(dtype).reshape(shape)
        view = memoryview(buffer)[offset : offset + nbytes]
        writable = bytearray(view) if frame == 0 or view.readonly else view
        return torch.frombuffer(writable, dtype=torch.uint8).view(dtype).reshape(shape)

    def _nested(self, data: bytes) -> Any:
        if self.nesting >= MAX_NESTING:
            raise BadFrame(f"encoded trees are nested deeper than {MAX_NESTING}")
        offset, length, first, count = _NESTED.unpack_from(data)
        frames = self.buffers[1 + first : 1 + first + count]
        if len(frames) != count:
            raise BadFrame(
                f"frames {first}..{first + count} of {len(self.buffers) - 1} are missing"
            )
        pack: Buffer = b""
        if length:
            pack = memoryview(self._buffer(0, offset, length))[offset : offset + length]
        try:
            return decode(data[_NESTED.size :], [pack, *frames], self.nesting + 1)
        except BadFrame as error:
            return Undecodable(error)

    def _buffer(self, frame: int, offset: int, nbytes: int) -> Buffer:
        if frame >= len(self.buffers):
            if not nbytes:
                return b""
            raise BadFrame(f"an array lies in buffer {frame}, but {len(self.buffers)} came")
        buffer = self.buffers[frame]
        if offset + nbytes > len(buffer):
            raise BadFrame(
                f"an array of {nbytes} bytes at {offset} does not fit buffer {frame} "
                f"of {len(buffer)} bytes"
            )
        return buffer


_TUPLE_MARKER = msgpack.ExtType(_TUPLE, b"")
_tuple_mark = object()


def _registered(name: bytes) -> _Registered:
    registered = _names.get(name)
    if registered is None:
        raise BadFrame(
            f"the class {name.decode(errors='replace')} is not registered here: import its module"
        )
    return registered


def _row_class(values: Sequence[Any]) -> _Registered | None:
    """The registered class that several values are all of, if so."""
    if not 1 < len(values) <= MAX_ROWS:
        return None
    cls = type(values[0])
    registered = _classes.get(cls)
    return registered if registered and len(set(map(type, values))) == 1 else None


def _same(values: Sequence[Any]) -> bool:
    """Whether one value can stand for all, in every bit of it."""
    first = values[0]
    cls = type(first)
    if first is values[-1] and len(set(map(id, values))) == 1:
        return True
    if len(set(map(type, values))) > 1:
        return False
    if cls in _ATOMS:
        return values.count(first) == len(values)
    if cls is tuple:
        return len(set(map(len, values))) == 1 and all(map(_same, zip(*values, strict=True)))
    registered = _classes.get(cls)
    return registered is not None and all(map(_same, registered.columns(values)))


def _unpack_place(data: bytes) -> tuple[int, tuple[int, ...], int, int, bytes]:
    """Split a place into dtype code, shape, frame, offset, and what follows the shape."""
    place = _PLACES[data[1]]
    code, _, frame, offset, *shape = place.unpack_from(data)
    return code, tuple(shape), frame, offset, data[place.size :]


def _scalar(data: bytes) -> Any:
    code, length = struct.unpack_from("<BI", data)
    start = 5 + length
    dtype = _described(data[5:start]) if code == _OTHER_DTYPE else _NUMPY_DTYPES[code]
    if len(data) != start + dtype.itemsize:
        raise BadFrame(f"a scalar of {dtype} in {len(data) - start} bytes")
    return np.ndarray((), dtype, data, start)[()]


def _description(dtype: Any, code: int) -> bytes:
    """Describe a dtype that is not in the table (byte order, text, dates, records). Objects are
    refused."""
    if code != _OTHER_DTYPE:
        return b""
    if dtype.hasobject or (dtype.kind == "V" and dtype.type is not np.void):
        raise TypeError(
            f"a payload cannot hold a numpy array of {dtype}: send numbers, or a torch tensor for "
            "bfloat16 and float8"
        )
    description: bytes = msgpack.packb(np.lib.format.dtype_to_descr(dtype))
    return description


def _described(description: bytes) -> "np.dtype[Any]":
    def tupled(node: Any) -> Any:
        # Lists became of both the list of fields and the tuple of each field; fields are those that
        # start with a name.
        if not isinstance(node, list):
            return node
        if node and isinstance(node[0], list) and not isinstance(node[0][0], int):
            return [tuple(map(tupled, each)) for each in node]
        return tuple(map(tupled, node))

    dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(tupled(msgpack.unpackb(description)))
    if dtype.hasobject:
        raise BadFrame(f"an array of objects ({dtype}) in a payload")
    return dtype
