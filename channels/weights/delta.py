"""What changed between two versions: elements by index, bit for bit, and a checksum of the whole state.

Elements are compared as integers of their size, so a NaN equals itself and zero differs from minus zero. In a file the
changes of the tensor "x" are two tensors: "index:x" (int32; int64 from 2^31 elements on) and "value:x".
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from channels.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS = 1 << 20  # compared at a time: stays in the cache
ROW_WORDS = 128  # of 8 bytes, summed before they are weighted
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed 64-bit number


class WeightsDelta:
    """A version as the changes to its base."""

    def __init__(self, changes: "Mapping[str, tuple[Tensor, Tensor]]", checksum: str) -> None:
        self.changes = changes  # name: (indices, values)
        self.checksum = checksum  # of the whole state with the changes

    @property
    def num_changed(self) -> int:
        """Elements that differ from the base."""
        return sum(indices.numel() for indices, _ in self.changes.values())

    def apply(self, state: "Mapping[str, Tensor]") -> None:
        """Make the base into the version, in place. state: every tensor of it, on any device.

        Raises WeightsMismatch if `state` was not the base; it is then neither version and has to be loaded anew.
        """
        for name, (indices, values) in self.changes.items():
            tensor = state.get(name)
            if tensor is None or tensor.dtype != values.dtype:
                have = "missing" if tensor is None else f"of {tensor.dtype}"
                raise WeightsMismatch(f"{name} is {have} where the delta has {values.dtype}")
            if not indices.numel():
                continue
            if int(indices.min()) < 0 or int(indices.max()) >= tensor.numel():
                raise WeightsMismatch(f"the delta of {name} points outside its {tensor.numel()}")
            flat = tensor.detach().contiguous()
            target = as_integers(flat)
            target[indices.to(target.device).long()] = as_integers(values).to(target.device)
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat)
        found = checksum(state)
        if found != self.checksum:
            raise WeightsMismatch(
                f"with the delta applied the state has checksum {found}, the version {self.checksum}"
            )

    def tensors(self) -> "dict[str, Tensor]":
        """What a file of it holds."""
        return {
            f"{part}:{name}": tensor
            for name, pair in self.changes.items()
            for part, tensor in zip(("index", "value"), pair, strict=True)
        }

    @classmethod
    def of_tensors(cls, tensors: "Mapping[str, Tensor]", checksum: str) -> "WeightsDelta":
        """Read what `tensors` gave."""
        changes = {}
        for label, values in tensors.items():
            part, _, name = label.partition(":")
            indices = tensors.get(f"index:{name}")
            if part == "value":
                if indices is None or indices.shape != values.shape or indices.is_floating_point():
                    raise WeightsMismatch(f"the delta of {name} has no index for each value")
                changes[name] = (indices, values)
        return cls(changes, checksum)


class Comparison:
    """Collects the changes of one version, tensor by tensor, as long as they stay below `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes
        self._changes: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def worthwhile(self) -> bool:
        """Whether the changes are still smaller than the limit."""
        return self._left_bytes > 0

    def add(self, name: str, new: "Tensor", old: "Tensor") -> None:
        """Compare a tensor. Both on the host, contiguous, of one dtype and shape."""
        import torch

        if not self.worthwhile:
            return
        ours, before = as_integers(new).numpy(), as_integers(old).numpy()
        index_type = np.int32 if ours.size < 2**31 else np.int64
        found = []
        for start in range(0, ours.size, BLOCK_ELEMENTS):
            block = slice(start, start + BLOCK_ELEMENTS)
            places = np.flatnonzero(ours[block] != before[block])
            if places.size:
                found.append((places + start).astype(index_type))
                self._left_bytes -= places.size * (found[-1].itemsize + ours.itemsize)
                if not self.worthwhile:
                    self._changes.clear()
                    return
        if found:
            indices = np.concatenate(found)
            values = torch.from_numpy(ours[indices]).view(new.dtype)
            self._changes[name] = (torch.from_numpy(indices), values)

    def delta(self, state: "Mapping[str, Tensor]") -> WeightsDelta:
        """The changes. state: the new version, all of it."""
        return WeightsDelta(self._changes, checksum(state))


def as_integers(tensor: "Tensor") -> "Tensor":
    """The elements of a contiguous tensor as integers of their size, flat, in the same memory."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().reshape(-1).view(integers[tensor.element_size()])


def checksum(state: "Mapping[str, Tensor]") -> str:
    """Of all names, dtypes, shapes and bytes; the same on every device.

    A tensor's words are summed in rows, and the rows weighted by odd numbers that depend on their place. Any change of
    one word is seen; words that trade places are unless they are within one row.
    """
    import torch

    names = sorted(state)
    sums = [_sum(state[name]) for name in names]
    digest = hashlib.blake2b(digest_size=16)
    for name, value in zip(names, torch.stack(sums).tolist() if sums else [], strict=True):
        tensor = state[name]
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape), value)).encode())
    return digest.hexdigest()


def _sum(tensor: "Tensor") -> "Tensor":
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    row_bytes = ROW_WORDS * 8
    whole = raw.numel() // row_bytes * row_bytes
    rows = raw[:whole]
    if rows.storage_offset() % 8:
        rows = rows.clone()
    sums = rows.view(torch.int64).view(whole // row_bytes, ROW_WORDS).sum(1)
    if whole < raw.numel():
        last = torch.zeros(row_bytes, dtype=torch.uint8, device=raw.device)
        last[: raw.numel() - whole] = raw[whole:]
        sums = torch.cat([sums, last.view(torch.int64).sum().reshape(1)])
    weights = torch.arange(sums.numel(), dtype=torch.int64, device=sums.device) * 2 + 1
    return (sums * (weights * _GOLDEN)).sum()
