"""Where two trees of arrays, numbers and texts differ, in words: what the contract check compares by."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


def difference(left: Any, right: Any, tolerance: float, path: str = "it") -> str:
    """Where two trees first differ and how; empty when they do not."""
    if type(left) is not type(right):
        return f"{path}: {type(left).__name__} against {type(right).__name__}"
    if dataclasses.is_dataclass(left):
        pairs = [
            (f"{path}.{f.name}", getattr(left, f.name), getattr(right, f.name))
            for f in dataclasses.fields(left)
        ]
    elif isinstance(left, Mapping):
        if left.keys() != right.keys():
            return f"{path}: keys {sorted(map(str, left))} against {sorted(map(str, right))}"
        pairs = [(f"{path}[{key!r}]", left[key], right[key]) for key in left]
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"{path}: {len(left)} entries against {len(right)}"
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        return _leaf_difference(left, right, tolerance, path)
    differences = (difference(a, b, tolerance, where) for where, a, b in pairs)
    return next(filter(None, differences), "")


def _leaf_difference(left: Any, right: Any, tolerance: float, path: str) -> str:
    if not (hasattr(left, "__array__") or isinstance(left, float | int)):
        return "" if left == right else f"{path}: {left!r:.80} against {right!r:.80}"
    a, b = (_array(value) for value in (left, right))
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{path}: {a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}"
    numeric = a.dtype.kind in "iufc"
    with np.errstate(invalid="ignore"):
        same = (
            np.isclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True)
            if numeric and tolerance
            else (a == b) | ((a != a) & (b != b))
        )
    if np.all(same):
        return ""
    place = tuple(int(i) for i in np.argwhere(~np.atleast_1d(same))[0])
    seen = f"{np.atleast_1d(a)[place]} against {np.atleast_1d(b)[place]}"
    return f"{path}{list(place) if a.shape else ''}: {seen}"


def _array(value: Any) -> np.ndarray[Any, Any]:
    """A number, a NumPy array or a torch tensor on any device, as an array."""
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def spoil(tree: Any) -> None:
    """Write other values into every array of a tree that may be written to."""
    if dataclasses.is_dataclass(tree):
        tree = [getattr(tree, f.name) for f in dataclasses.fields(tree)]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for part in tree:
            spoil(part)
    elif isinstance(tree, np.ndarray) and tree.flags.writeable and tree.dtype.kind in "iufb":
        tree[...] = tree == 0
