"""Writes TOML: numbers, strings, booleans, lists and tables, which is all that a job holds.

Python reads TOML and does not write it. Not a general emitter: dates and times are refused.
"""

import re
from collections.abc import Mapping
from typing import Any

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
ESCAPES = {
    "\\": "\\\\",
    '"': '\\"',
    "\n": "\\n",
    "\t": "\\t",
    "\r": "\\r",
    "\b": "\\b",
    "\f": "\\f",
}


def dump_toml(document: Mapping[str, Any]) -> str:
    """The document as TOML text that tomllib reads back to an equal one. None values are left out.

    Tables of the first two levels get a [header] each; deeper ones are written inline.
    """
    lines: list[str] = []
    _scalars(document, lines)
    for name, table in document.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{key_text(name)}]"]
            _scalars(table, lines)
            for inner, values in table.items():
                if isinstance(values, Mapping):
                    lines += ["", f"[{key_text(name)}.{key_text(inner)}]"]
                    lines += [
                        f"{key_text(key)} = {value_text(value)}"
                        for key, value in values.items()
                        if value is not None
                    ]
    return "\n".join(lines).lstrip("\n") + "\n"


def key_text(key: str) -> str:
    """A key as TOML writes it: bare where it may be."""
    return key if BARE_KEY.fullmatch(key) else _string(key)


def value_text(value: Any) -> str:
    """One value as TOML writes it, on one line. TypeError for what TOML, or a job, cannot hold."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str():
            return _string(value)
        case list() | tuple():
            return "[" + ", ".join(value_text(item) for item in value) + "]"
        case Mapping():
            pairs = (
                f"{key_text(key)} = {value_text(item)}"
                for key, item in value.items()
                if item is not None
            )
            return "{" + ", ".join(pairs) + "}"
    raise TypeError(f"a job file cannot hold a value of type {type(value).__name__}")


def _scalars(table: Mapping[str, Any], lines: list[str]) -> None:
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{key_text(key)} = {value_text(value)}")


def _string(text: str) -> str:
    escaped = (
        ESCAPES.get(char)
        or (f"\\u{ord(char):04x}" if ord(char) < 0x20 or ord(char) == 0x7F else char)
        for char in text
    )
    return '"' + "".join(escaped) + '"'
