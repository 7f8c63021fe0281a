"""The safetensors layout: where each tensor of a version lies in its file. Decides, opens nothing.

https://github.com/huggingface/safetensors. Tensors begin at a multiple of 64 bytes of the file, wide dtypes first, so
that every tensor is aligned.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from channels.errors import BadFrame

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100 * 1000 * 1000  # as safetensors itself

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
_NAMES = {name: code for code, name in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor lies: bytes from the start of its file."""

    dtype: "torch.dtype"
    shape: list[int]
    offset: int
    size_bytes: int


class Sized(Protocol):
    """A tensor, or what stands for one that is not here."""

    @property
    def dtype(self) -> "torch.dtype": ...

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def nbytes(self) -> int: ...

    def element_size(self) -> int: ...


class Layout(NamedTuple):
    """A file's header and what it says."""

    header: bytes
    metadata: dict[str, str]
    places: dict[str, Place]
    size_bytes: int  # of the whole file


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def lay_out(tensors: Mapping[str, Sized], metadata: Mapping[str, str]) -> Layout:
    """The file that holds these tensors. Raises ValueError for one that safetensors cannot hold."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in ordered:
        code = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise ValueError(
                f'weights "{name}" have dtype {tensor.dtype}, which safetensors cannot hold: convert them'
            )
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % 64)
    header = struct.pack("<Q", len(text)) + text
    places = {}
    start = len(header)
    for name, tensor in ordered:
        places[name] = Place(tensor.dtype, list(tensor.shape), start, tensor.nbytes)
        start += tensor.nbytes
    return Layout(header, dict(metadata), places, start)


def read_layout(buffer: memoryview, source: object, size_bytes: int | None = None) -> Layout:
    """What the file in `buffer` says of itself. Raises BadFrame, naming `source`, unless all of it lies inside.

    size_bytes: of the whole file, where the buffer is only its beginning
    """
    import torch

    size_bytes = len(buffer) if size_bytes is None else size_bytes
    size = struct.unpack_from("<Q", buffer)[0] if len(buffer) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(buffer) - 8):
        raise BadFrame(f"{source} is not a safetensors file")
    header = bytes(buffer[: 8 + size])
    try:
        raw = msgspec.json.decode(header[8:], type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(
            raw.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str]
        )
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except msgspec.DecodeError as error:
        raise BadFrame(f"{source} has a damaged header: {error}") from error
    places = {}
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise BadFrame(f'{source}: weights "{name}" have the unknown dtype {entry.dtype}')
        dtype: torch.dtype = getattr(torch, DTYPES[entry.dtype])
        first, last = entry.data_offsets
        fits = 0 <= first <= last <= size_bytes - len(header) and min(entry.shape, default=0) >= 0
        if not fits or last - first != math.prod(entry.shape) * dtype.itemsize:
            raise BadFrame(f'{source}: weights "{name}" do not lie where the header says')
        places[name] = Place(dtype, entry.shape, len(header) + first, last - first)
    return Layout(header, metadata, places, size_bytes)


def views(buffer: object, places: Mapping[str, Place]) -> "dict[str, torch.Tensor]":
    """The tensors that lie in a writable buffer; each keeps the buffer alive."""
    import torch

    tensors = {}
    for name, place in places.items():
        if not place.size_bytes:
            tensors[name] = torch.empty(place.shape, dtype=place.dtype)
            continue
        raw = torch.frombuffer(
            buffer, dtype=torch.uint8, offset=place.offset, count=place.size_bytes
        )
        tensors[name] = raw.view(place.dtype).reshape(place.shape)
    return tensors


def same_layout(left: Mapping[str, Place], right: Mapping[str, Place]) -> bool:
    """Whether both hold tensors of the same names, dtypes and shapes."""

    def kinds(places: Mapping[str, Place]) -> dict[str, tuple[object, Sequence[int]]]:
        return {name: (place.dtype, place.shape) for name, place in places.items()}

    return kinds(left) == kinds(right)
