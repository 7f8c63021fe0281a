"""How large a payload is, wherever it travels: encoded, or by reference within a process."""

import dataclasses
from functools import cache
from typing import Any

from channels.payload import Encoded


def size_bytes(packed: Any) -> int:
    """Bytes of what `Endpoint.pack` returned; of a tree by reference, those of its arrays and strings."""
    if isinstance(packed, Encoded):
        return packed.size_bytes
    total = 0
    pending = [packed]
    while pending:
        value = pending.pop()
        if value is None or isinstance(value, int | float):
            continue
        if isinstance(value, bytes | bytearray | str):
            total += len(value)
        elif isinstance(value, dict):
            pending.extend(value)
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif names := _fields(value.__class__):
            pending.extend([getattr(value, name) for name in names])
        else:
            total += int(getattr(value, "nbytes", 0))  # arrays of numpy, tensors, memoryviews
    return total


@cache
def _fields(kind: type) -> tuple[str, ...]:
    """Of a dataclass; none of any other type. Every item of an inline job is asked, thousands a second."""
    is_one = dataclasses.is_dataclass(kind)
    return tuple(field.name for field in dataclasses.fields(kind)) if is_one else ()
