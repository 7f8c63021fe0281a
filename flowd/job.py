"""Reads job files into typed, checked values, and writes them back.

A violation is one sentence: where, the value seen, the rule, the way out. What can be known
without starting a process is checked here, so a wrong job costs its user no wait. Torch-free.
"""

import re
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import msgspec

from actors.job_config import JobConfig
from flowd.errors import JobFileError
from flowd.job_rules import Origin, check_rules, resolve_paths
from flowd.toml_text import dump_toml, value_text

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
}
EXAMPLES = {
    "int": "1",
    "float": "0.5",
    "str": '"…"',
    "bool": "true",
    "array": "[…]",
    "object": "{name = value}",
}
BOUNDS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file, apply `section.key=value` overrides, and check it.

    Values of overrides are written as in TOML; a bare word is a string. Relative paths in the job
    are taken from the working directory and made absolute. Raises JobFileError.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise JobFileError(f"job file {path} does not exist{_near_file(path)}") from None
    except IsADirectoryError:
        raise JobFileError(
            f"job file {path} is a folder: name a .toml file{_near_file(path / '*')}"
        ) from None
    except UnicodeDecodeError as error:
        raise JobFileError(
            f"job file {path} is not UTF-8 text (byte {error.start}): a job is a TOML file; "
            "save it as UTF-8"
        ) from None
    except OSError as error:
        raise JobFileError(
            f"job file {path} cannot be read: {error.strerror}; make it readable for you"
        ) from None
    return parse_job(text, str(path), overrides)


def parse_job(text: str, source: str, overrides: Sequence[str] = ()) -> JobConfig:
    """As load_job, from the text of a job file; `source` names it in errors."""
    origin = Origin(source)
    config = resolve_paths(_parse(text, origin, overrides))
    check_rules(config, origin)
    return config


def parse_resolved(text: str, source: str) -> JobConfig:
    """Read back what `dump_job` wrote, without a look at the disk.

    A job that was checked when it was submitted stays readable when its data or model moved since.
    """
    return _parse(text, Origin(source), ())


def _parse(text: str, origin: Origin, overrides: Sequence[str]) -> JobConfig:
    """The job as written: names, types and ranges are checked."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise JobFileError(_syntax_sentence(text, origin.name, error)) from None
    for override in overrides:
        _apply(document, override, origin)
    _check_names(document, origin)
    try:
        return msgspec.convert(document, JobConfig)
    except msgspec.ValidationError as error:
        raise JobFileError(_value_sentence(document, origin, str(error))) from None


def dump_job(config: JobConfig) -> str:
    """The whole job, defaults included, as TOML that `parse_job` reads back to an equal value."""
    return dump_toml({name: msgspec.to_builtins(section) for name, section in _sections(config)})


def _sections(config: JobConfig) -> Iterable[tuple[str, msgspec.Struct]]:
    sections = ((name, getattr(config, name)) for name in config.__struct_fields__)
    return ((name, section) for name, section in sections if section is not None)


def _apply(document: dict[str, Any], override: str, origin: Origin) -> None:
    path_text, equals, value = override.partition("=")
    keys = [key.strip() for key in path_text.split(".")]
    if not equals or not all(keys):
        raise JobFileError(
            f"--set {override}: an override is written section.key=value, "
            "as in --set rollout.group_size=16"
        )
    if len(keys) == 1:
        if keys[0] in _FIELDS:
            raise JobFileError(
                f"--set {override}: {keys[0]} is a section: set one of its keys, as in "
                f"--set {keys[0]}.{next(iter(_FIELDS[keys[0]]))}=…"
            )
        owners = [s for s, fields in _FIELDS.items() if keys[0] in fields]
        way = f"--set {owners[0]}.{override}" if owners else "--set job.steps=100"
        raise JobFileError(f"--set {override}: the key needs its section in front, as in {way}")
    table = document
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise JobFileError(
                f"--set {override}: {'.'.join(keys[: depth + 1])} is a value, not a table; "
                f"shorten the path"
            )
    table[keys[-1]] = _override_value(override, value.strip())
    origin.overridden.add((keys[0], keys[1]))


def _override_value(override: str, text: str) -> Any:
    if not text:
        raise JobFileError(
            f"--set {override}: there is no value after the =; an empty text is written ''"
        )
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[0] in "\"'[{":
            reason = str(error).partition(" (at ")[0]
            raise JobFileError(
                f"--set {override}: the value is not TOML ({reason}); "
                'numbers, true, "text" and [1, 2] are, and a bare word is taken as text'
            ) from None
        return text
    # A line break would smuggle in further keys.
    return parsed["value"] if parsed.keys() == {"value"} else text


def _check_names(document: dict[str, Any], origin: Origin) -> None:
    for section, table in document.items():
        if section not in _FIELDS:
            if not isinstance(table, dict):
                owners = [s for s, fields in _FIELDS.items() if section in fields]
                way = (
                    f"move it below [{owners[0]}]" if owners else f"sections are {_listed(_FIELDS)}"
                )
                raise JobFileError(
                    f"{origin.name}: {section} = {value_text_or_type(table)} stands outside of a "
                    f"section, where no key belongs; {way}"
                )
            raise JobFileError(
                f"{origin.where(section)}: [{section}] is not a section of a job; "
                + _near(section, _FIELDS, "sections are")
            )
        if not isinstance(table, dict):
            raise JobFileError(
                f"{origin.name}: {section} = {value_text_or_type(table)} must be a table; "
                f"write [{section}] and its keys below"
            )
        for key in table:
            if key not in _FIELDS[section]:
                shown = f"[{section}] {key} = {value_text_or_type(table[key])}"
                owners = [s for s, fields in _FIELDS.items() if key in fields]
                way = (
                    f"it belongs below [{owners[0]}]"
                    if owners
                    else _near(key, _FIELDS[section], f"keys of [{section}] are")
                )
                raise JobFileError(
                    f"{origin.where(section, key)}: {shown} is not a key of this section; {way}"
                )


def _value_sentence(document: dict[str, Any], origin: Origin, error: str) -> str:
    """msgspec's "Expected `int` >= 1 - at `$.rollout.group_size`" as a sentence of ours."""
    rule, _, place = error.partition(" - at `$")
    steps = re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", place.rstrip("`"))
    names = [name for name, _ in steps if name]
    if match := re.search(r"missing required field `(\w+)`", rule):
        key = match[1]
        if not names:
            return f"{origin.name}: section [{key}] is missing and has no default; add it"
        return (
            f"{origin.name}: [{names[0]}] {key} is missing and has no default; "
            f"add {key} = … below [{names[0]}]"
        )
    section, key = names[0], names[1]
    value = document[section][key]
    shown = f"{origin.where(section, key)}: [{section}] {key} = {value_text_or_type(value)}"
    default = _default_text(section, key)
    if match := re.fullmatch(r"Expected `(\w+)` ([<>]=?) (\S+)", rule):
        bound = match[3].removesuffix(".0")
        return f"{shown} is out of range: it must be {BOUNDS[match[2]]} {bound}{default}"
    if section == "job" and key == "name" and "regex" in rule:
        return (
            f"{shown} is not a job name: 1 to 64 letters, digits, dots, dashes and underscores, "
            "the first a letter or digit; such as " + _repaired_name(value)
        )
    if match := re.fullmatch(r"Expected `(.+)`, got `\w+`", rule):
        expected = match[1].removesuffix(" | null")
        within = " in every place" if len(steps) > len(names) else ""
        way = default
        if isinstance(value, str) and expected in ("int", "float", "bool"):
            way = "; write it without quotes" if _is_value(value, expected) else default
        if expected == "int" and isinstance(value, float) and value.is_integer():
            way = f"; write {key} = {int(value)}"
        if not way:
            way = f"; write {key} = {EXAMPLES.get(expected, '…')}"
        return (
            f"{shown} has the wrong type: it must be {KINDS.get(expected, expected)}{within}{way}"
        )
    if match := re.fullmatch(r"Expected `array` of length (\d+), got \d+", rule):
        return f"{shown} must be a list of exactly {match[1]} values{default}"
    return f"{shown}: {rule[:1].lower() + rule[1:]}{default}"


def value_text_or_type(value: Any) -> str:
    """The value as it stands in the file, shortened to stay within a sentence."""
    try:
        text = value_text(value)
    except TypeError:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _default_text(section: str, key: str) -> str:
    field = _FIELDS[section][key]
    if field.default is msgspec.NODEFAULT or field.default is None:
        return ""
    return f"; the default is {value_text_or_type(field.default)}"


def _is_value(text: str, kind: str) -> bool:
    if kind == "bool":
        return text in ("true", "false")
    pattern = r"[+-]?\d+" if kind == "int" else r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?"
    return re.fullmatch(pattern, text) is not None


def _repaired_name(name: str) -> str:
    repaired = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:64]
    return value_text(repaired or "my-job")


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {_listed(known)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _near_file(path: Path) -> str:
    try:
        known = sorted(entry.name for entry in path.parent.glob("*.toml"))
        known = [name for name in known if name != "pyproject.toml"]
    except OSError:
        known = []
    near = get_close_matches(path.name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {path.parent / near[0]}?"
    if known:
        return f"; in {path.parent} there are {_listed(known[:8])}"
    return f"; {path.parent} holds no job, see configs/ for jobs to start from"


def _syntax_sentence(text: str, source: str, error: tomllib.TOMLDecodeError) -> str:
    message = str(error)
    reason = message.partition(" (at ")[0]
    reason = reason[:1].lower() + reason[1:]
    lines = text.splitlines() or [""]
    match = re.search(r"line (\d+), column (\d+)", message)
    line, column = (int(match[1]), int(match[2])) if match else (len(lines), 0)
    shown = lines[min(line, len(lines)) - 1].strip()
    place = f"line {line}, column {column}" if match else f"line {line} (the end)"
    return f"{source}, {place}: not TOML, {reason}, in: {shown[:100]}"


def _struct(type_: Any) -> Any:
    """The section's class, also of a section that may be left out."""
    return next((each for each in get_args(type_) if each is not type(None)), type_)


_FIELDS: dict[str, dict[str, msgspec.structs.FieldInfo]] = {
    section.name: {field.name: field for field in msgspec.structs.fields(_struct(section.type))}
    for section in msgspec.structs.fields(JobConfig)
}
