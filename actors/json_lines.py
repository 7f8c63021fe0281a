"""Strict JSON for what a run leaves behind: a number that JSON does not have (NaN, inf) is null.

Python's own encoder writes such numbers bare, and then other readers (jq, a browser, a data base) refuse the file.
"""

from typing import Any

import msgspec


def line_of(data: Any) -> bytes:
    """One line of a JSON-lines file, with its end."""
    return _ENCODER.encode(data) + b"\n"


def as_json(data: Any) -> Any:
    """The data as a reader of its JSON gets it."""
    return msgspec.json.decode(_ENCODER.encode(data))


def _plain(value: Any) -> Any:
    """numpy's scalars are numbers too: tasks compute what they put into `info`."""
    try:
        return value.item()
    except (AttributeError, ValueError):
        raise TypeError(
            f"a {type(value).__name__} cannot be written as JSON: use numbers and short strings"
        ) from None


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)
