"""Tables of a task's arguments as typed values: unknown keys, wrong types and missing ones are told in one sentence."""

import builtins
import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

KINDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "a table",
    list: "a list",
}


def from_table(cls: type[T], table: Any, where: str) -> T:
    """A dataclass from the table of a job file. ValueError names the place, the value and the rule."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} = {table!r:.80}: it must be a table")
    hints = get_type_hints(cls)
    for key in table:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(hints)}"
            raise ValueError(f'{where} takes no "{key}": {hint}')
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in table:
            values[field.name] = typed(
                table[field.name], hints[field.name], f"{where}.{field.name}"
            )
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f'{where} needs "{field.name}", which has no default: give it')
    return cls(**values)


def typed(value: Any, hint: Any, where: str) -> Any:
    """The value if it is of the type; a whole number is a number too."""
    kind = get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} = {value!r:.80}: it must be {KINDS[kind]}")
    match kind, get_args(hint):
        case builtins.list, [item]:
            return [typed(each, item, f"{where}[{i}]") for i, each in enumerate(value)]
        case builtins.dict, [_, item] if item is not Any:
            return {key: typed(each, item, f"{where}.{key}") for key, each in value.items()}
    return value
