"""The files of one weights directory: who may read or overwrite one, and mappings that outlive a version.

A reader holds a shared lock on a file while it uses it, the publisher an exclusive one while it writes. The locks are
the operating system's, so a process that dies holds nothing.

First touches of a mapping cost about half of what the copy of its bytes costs, and fresh pages of tmpfs several times
it. So a publisher writes over the file of a version that leaves, and both ends keep their mappings of a file when its
bytes become another version.
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

import numpy as np

from channels.errors import BadFrame
from channels.weights.layout import Layout, read_layout, views

if TYPE_CHECKING:
    import torch


class Mappings:
    """Shared mappings by inode. They hold no lock: whoever uses one has locked the file itself."""

    def __init__(self, *, writable: bool) -> None:
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._by_inode: dict[tuple[int, int], mmap.mmap] = {}

    def get(self, file: BinaryIO, size_bytes: int) -> mmap.mmap:
        """A mapping of at least this many bytes. The file must have them."""
        status = os.fstat(file.fileno())
        inode = (status.st_dev, status.st_ino)
        mapping = self._by_inode.get(inode)
        if mapping is None or len(mapping) < size_bytes:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapping = mmap.mmap(file.fileno(), size_bytes, flags=flags, prot=self._protection)
            self._by_inode[inode] = mapping
        return mapping

    def forget_others(self, directories: Iterable[Path]) -> None:
        """Let go of files that are no longer in these directories: their memory is still taken until then."""
        present = set()
        for directory in directories:
            if not directory.exists():
                continue
            for entry in os.scandir(directory):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                present.add((status.st_dev, status.st_ino))
        for inode in self._by_inode.keys() - present:
            del self._by_inode[inode]  # unmapped once no tensor lies in it


class Space:
    """A file that is being written, locked against readers and removed unless it becomes a version."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file: BinaryIO | None = file
        self.size_bytes = os.fstat(file.fileno()).st_size

    @classmethod
    def make(cls, directory: Path, purpose: str = "") -> Self:
        """An empty file. purpose: tells apart what one process writes at a time."""
        path = directory / f".{os.getpid()}{purpose}.partial"
        file = path.open("w+b", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        return cls(path, file)

    @classmethod
    def take(cls, version: Path) -> Self | None:
        """The space of a file that nobody reads or writes; None when somebody does."""
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

    def hold(self, layout: Layout, mappings: Mappings) -> "dict[str, torch.Tensor]":
        """Give the file this layout. Returns the tensors in it, to be written.

        Raises OSError (ENOSPC) here when there is no room, not in the copy, where it would be a bus error.
        """
        assert self._file is not None
        missing = layout.size_bytes - self.size_bytes
        if missing > 0:
            os.posix_fallocate(self._file.fileno(), self.size_bytes, missing)
        else:
            self._file.truncate(layout.size_bytes)
        self.size_bytes = layout.size_bytes
        mapping = mappings.get(self._file, layout.size_bytes)
        mapping[: len(layout.header)] = layout.header
        return views(mapping, layout.places)

    def become(self, target: Path) -> None:
        """Show the file under this name, complete."""
        assert self._file is not None
        # Before it can be seen: a reader must not find it locked.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self.path.rename(target)
        self._file.close()
        self._file = None

    def drop(self) -> None:
        """Remove the file, unless it became a version."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def open_locked(path: Path) -> BinaryIO:
    """Open a file against re-use, until it is unlocked or closed. FileNotFoundError when gone."""
    while True:
        file = path.open("rb", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Between open and lock it may have been taken and given another name.
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BlockingIOError as error:
            file.close()
            # Its space is being used for another version.
            raise FileNotFoundError(path) from error
        except BaseException:
            file.close()
            raise
        file.close()


def map_privately(path: Path) -> "tuple[Layout, Mapping[str, torch.Tensor]]":
    """A file's tensors in a mapping of their own: protected as long as one of them lives, writes stay private."""
    with open_locked(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise BadFrame(f"{path} is empty, not a safetensors file")
        # The mapping has its own descriptor of the locked file.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    with memoryview(mapping) as buffer:
        layout = read_layout(buffer, path)
    return layout, views(mapping, layout.places)


class Borrowed:
    """`with`: a file's tensors in a mapping that is kept for the next time. They are not to be written (the pages are
    read-only: it is a segmentation fault), and say something else once the block is left."""

    def __init__(self, path: Path, mappings: Mappings) -> None:
        self._file = open_locked(path)
        try:
            size_bytes = os.fstat(self._file.fileno()).st_size
            if not size_bytes:
                raise BadFrame(f"{path} is empty, not a safetensors file")
            mapping = mappings.get(self._file, size_bytes)
            with memoryview(mapping) as buffer:
                self.layout = read_layout(buffer[:size_bytes], path)
            self.tensors = views(_pages(mapping), self.layout.places)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the publisher write over the file again."""
        # The mapping has a descriptor of the same lock, so closing would not be enough.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _pages(mapping: mmap.mmap) -> object:
    """A read-only mapping as a buffer that torch takes for writable; keeps the mapping alive."""
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    pages = (ctypes.c_ubyte * len(mapping)).from_address(address)
    vars(pages)["mapping"] = mapping
    return pages
