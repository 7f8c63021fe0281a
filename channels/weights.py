"""The node's host copy of policy weights: one safetensors file per version, on a tmpfs directory.

    directory = WeightsDirectory([shm / "job", run / "weights"], keep=2)
    published = directory.publish(run_attempt, version, model_tensors)       # the trainer
    tensors = directory.load(run_attempt, version)                           # any process of the
    node

Contract:
* A version is named (run_attempt, version): a job that was rolled back repeats version numbers.
* A version appears at once and complete, or not at all, whenever the publisher dies.
* The newest `keep` versions stay. Opening an older one raises VersionGone; tensors that were loaded
  stay valid and unchanged for as long as they live, also when their version is deleted.
* Nothing is copied at a load: the tensors are mapped. They may be written; a write stays private.

With keep >= 2, publishing writes over the space of the version that leaves, when nobody maps it:
fresh pages of tmpfs cost several times the copy. Whoever maps a file holds a shared lock on it, so
the publisher knows, and a reader that dies holds nothing.

Calls block for the time of the copy: call them in the worker thread. Not for use from several
nodes.
"""

import errno
import fcntl
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import msgspec

from channels.errors import BadFrame, ChannelError, VersionGone
from channels.messages import Message

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100 * 1000 * 1000  # as safetensors itself
SPARE_BYTES = 64 * 1024 * 1024  # that a file system must have left after a publish

# https://github.com/huggingface/safetensors, Dtype
_DTYPES = {
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
_NAMES = {name: code for code, name in _DTYPES.items()}
_FILE = re.compile(r"weights-(\d+)-(\d+)\.safetensors")


class WeightsPublished(Message, frozen=True, tag="weights_published"):
    """Publisher to rollout actors of the node: a version can be loaded. Once per version, in order."""

    run_attempt: int
    policy_version: int
    path: str
    size_bytes: int


class _Entry(msgspec.Struct):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Version(NamedTuple):
    run_attempt: int
    version: int
    path: Path


class WeightsDirectory:
    """The versions of one job on one node. One process publishes; any may read.

    paths: directories in order of preference, such as one in /dev/shm and one in the run directory;
    a version goes to the first with room for it. They are made when the first version is published.
    keep: versions that stay.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}, but the newest version always stays: give at least 1")
        given = (paths,) if isinstance(paths, str | Path) else paths
        self.paths = tuple(Path(path) for path in given)
        if not self.paths:
            raise ValueError("no directory for weights: give at least one path")
        self.keep = keep

    def publish(
        self, run_attempt: int, version: int, tensors: "Iterable[tuple[str, torch.Tensor]]"
    ) -> WeightsPublished:
        """Write a version and delete those beyond `keep`. Replaces a version of the same name.

        tensors: (name, tensor) pairs, on any device, in any layout. Raises ChannelError when no
        directory has room, ValueError for a tensor that safetensors cannot hold.
        """
        header, ordered = _layout(dict(tensors), run_attempt, version)
        size_bytes = len(header) + sum(tensor.nbytes for _, tensor in ordered)
        self._delete_abandoned()
        reused = self._retire(self.keep - 1) if self.keep > 1 else None
        try:
            path = self._write(run_attempt, version, header, ordered, size_bytes, reused)
        finally:
            if reused is not None:
                reused.drop()
        self._delete_beyond(self.keep)
        return WeightsPublished(
            run_attempt=run_attempt, policy_version=version, path=str(path), size_bytes=size_bytes
        )

    def newest(self) -> WeightsPublished | None:
        """The newest version there is, by run attempt and then by version; None before the first."""
        for found in sorted(self._versions(), reverse=True):
            try:
                size_bytes = found.path.stat().st_size
            except FileNotFoundError:
                continue
            return WeightsPublished(
                run_attempt=found.run_attempt,
                policy_version=found.version,
                path=str(found.path),
                size_bytes=size_bytes,
            )
        return None

    def load(self, run_attempt: int, version: int) -> "dict[str, torch.Tensor]":
        """The tensors of a version by name, mapped. Raises VersionGone, BadFrame for a damaged
        file."""
        for path in self.paths:
            file = path / _file_name(run_attempt, version)
            try:
                return _map(file)
            except FileNotFoundError:
                continue
        raise VersionGone(
            f"version {version} of run attempt {run_attempt} is not in "
            f"{' or '.join(map(str, self.paths))}: it was replaced; load the newest instead"
        )

    def clear(self) -> None:
        """Delete every version and what a publisher that died left behind."""
        self._delete_beyond(0)
        for path in self.paths:
            for left in path.glob(".*.partial"):
                left.unlink(missing_ok=True)

    def _versions(self) -> Iterator[_Version]:
        for path in self.paths:
            for entry in path.glob("weights-*.safetensors"):
                match = _FILE.fullmatch(entry.name)
                if match:
                    yield _Version(int(match[1]), int(match[2]), entry)

    def _delete_abandoned(self) -> None:
        """Delete what publishers that died were writing: nobody holds its lock any more."""
        for path in self.paths:
            for left in path.glob(".*.partial"):
                space = _Space.take(left)
                if space is not None:
                    space.drop()

    def _delete_beyond(self, keep: int) -> None:
        for found in sorted(self._versions(), reverse=True)[keep:]:
            found.path.unlink(missing_ok=True)  # who maps it keeps it until done

    def _retire(self, keep: int) -> "_Space | None":
        """Take the oldest version beyond `keep` out of sight, and its space if nobody maps it."""
        leaving = sorted(self._versions(), reverse=True)[keep:]
        if not leaving:
            return None
        space = _Space.take(leaving[-1].path)
        if space is None:
            leaving[-1].path.unlink(missing_ok=True)  # who maps it keeps it until done
        return space

    def _write(
        self,
        run_attempt: int,
        version: int,
        header: bytes,
        ordered: "list[tuple[str, torch.Tensor]]",
        size_bytes: int,
        reused: "_Space | None",
    ) -> Path:
        problems = []
        for path in self.paths:
            path.mkdir(parents=True, exist_ok=True)
            here = reused is not None and reused.path.parent == path
            free = _free_bytes(path) + (reused.size_bytes if reused is not None and here else 0)
            if free < size_bytes + SPARE_BYTES:
                problems.append(f"{path} has {free} bytes")
                continue
            space = reused if reused is not None and here else _Space.make(path)
            target = path / _file_name(run_attempt, version)
            try:
                space.fill(header, ordered, size_bytes)
                space.become(target)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                problems.append(f"{path} ran full")
                continue
            finally:
                space.drop()
            return target
        raise ChannelError(
            f"no room for {size_bytes} bytes of weights: {', '.join(problems)}; "
            "free space there, or keep fewer versions"
        )


class _Space:
    """A file that is being written, locked against readers and removed unless it becomes a version."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file: BinaryIO | None = file
        self.size_bytes = os.fstat(file.fileno()).st_size

    @classmethod
    def make(cls, directory: Path) -> "_Space":
        path = directory / f".{os.getpid()}.partial"
        file = path.open("w+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        return cls(path, file)

    @classmethod
    def take(cls, version: Path) -> "_Space | None":
        """The space of a file that nobody maps or writes; None when somebody does."""
        try:
            file = version.open("r+b", buffering=0)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        path = version.with_name(f".{os.getpid()}.partial")
        version.rename(path)
        return cls(path, file)

    def fill(
        self, header: bytes, ordered: "list[tuple[str, torch.Tensor]]", size_bytes: int
    ) -> None:
        assert self._file is not None
        self._file.seek(0)
        _write_all(self._file, memoryview(header))
        for _, tensor in ordered:
            _write_all(self._file, _bytes_of(tensor))
        self._file.truncate(size_bytes)

    def become(self, target: Path) -> None:
        assert self._file is not None
        fcntl.flock(
            self._file, fcntl.LOCK_UN
        )  # before it can be seen: a reader must not find it locked
        self.path.rename(target)
        self._file.close()
        self._file = None

    def drop(self) -> None:
        """Remove the file, unless it became a version."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _file_name(run_attempt: int, version: int) -> str:
    return f"weights-{run_attempt:06d}-{version:010d}.safetensors"


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _layout(
    tensors: "dict[str, torch.Tensor]", run_attempt: int, version: int
) -> "tuple[bytes, list[tuple[str, torch.Tensor]]]":
    """The safetensors header, and the tensors in file order: wide dtypes first, so all are aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, object] = {
        "__metadata__": {"run_attempt": str(run_attempt), "policy_version": str(version)}
    }
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
    return struct.pack("<Q", len(text)) + text, ordered


def _bytes_of(tensor: "torch.Tensor") -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]  # one call writes at most 2 GiB


def _map(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    mapping = _open(path)
    while mapping is None:
        mapping = _open(path)
    entries, start = _header(mapping, path)
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise BadFrame(f'{path}: weights "{name}" have the unknown dtype {entry.dtype}')
        dtype: torch.dtype = getattr(torch, _DTYPES[entry.dtype])
        shape, (first, last) = entry.shape, entry.data_offsets
        count = math.prod(shape)
        if first < 0 or last - first != count * dtype.itemsize or start + last > len(mapping):
            raise BadFrame(f'{path}: weights "{name}" do not lie where the header says')
        if not count:
            tensors[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=start + first, count=last - first)
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors


def _open(path: Path) -> mmap.mmap | None:
    """Map a file against re-use; None when another one has taken its name meanwhile.
    FileNotFoundError when gone."""
    with path.open("rb", buffering=0) as file:
        try:
            # Held by the mapping's own descriptor, that is for as long as any tensor lives.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileNotFoundError(path) from error  # its space is being used for another version
        # Between open and lock it may have been taken and given another name.
        status = os.fstat(file.fileno())
        if path.stat().st_ino != status.st_ino:
            return None
        if not status.st_size:
            raise BadFrame(f"{path} is empty, not a safetensors file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _header(mapping: mmap.mmap, path: Path) -> tuple[dict[str, _Entry], int]:
    size = struct.unpack_from("<Q", mapping)[0] if len(mapping) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(mapping) - 8):
        raise BadFrame(f"{path} is not a safetensors file")
    try:
        raw = msgspec.json.decode(mapping[8 : 8 + size], type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except msgspec.DecodeError as error:
        raise BadFrame(f"{path} has a damaged header: {error}") from error
    return entries, 8 + size
