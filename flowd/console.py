"""What commands print: data on stdout (text or JSON), talk and hints on stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def print_json(data: Any) -> None:
    """One JSON document on one line, written at once: a reader may be waiting for it."""
    print(json.dumps(data, default=str), flush=True)


def hint(text: str) -> None:
    """Talk, on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows under a header line, in columns as wide as their widest cell; numbers to the right."""
    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [
        bool(cells) and all(is_number(row[position]) for row in cells)
        for position in range(len(columns))
    ]
    lines = []
    for line in [list(columns), *cells]:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as a table shows it; "-" where there is none."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return number(value)
        case list() | tuple():
            return " ".join(map(str, value)) or "-"
        case Mapping():
            return " ".join(f"{key}={cell(item)}" for key, item in value.items()) or "-"
    return str(value)


def is_number(text: str) -> bool:
    return text == "-" or text.replace(",", "").replace(".", "").removeprefix("-").isdigit()


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for reading: thousands grouped, small fractions with `digits` places."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1 before the point."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def stage_times(actors: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Per stage how its actors' time divides, as in {"rollout": "work 81%, waits for weights 12%"}.

    actors: as in a job's status; `time` holds seconds under "work" and "wait_…". Of the waits the
    longest is named; stages that have measured nothing yet are left out.
    """
    sums: dict[str, dict[str, float]] = {}
    for actor in actors:
        times = sums.setdefault(str(actor.get("kind")), {})
        for key, seconds in (actor.get("time") or {}).items():
            times[key] = times.get(key, 0.0) + float(seconds)
    shares = {}
    for kind, times in sums.items():
        total = sum(times.values())
        if total <= 0:
            continue
        text = f"work {times.get('work', 0.0) / total:.0%}"
        waits = [(seconds, key) for key, seconds in times.items() if key.startswith("wait_")]
        if waits and max(waits)[0] > 0:
            seconds, key = max(waits)
            text += (
                f", waits for {key.removeprefix('wait_').replace('_', ' ')} {seconds / total:.0%}"
            )
        shares[kind] = text
    return shares


def failure(status: Mapping[str, Any], *, way_out: bool = True) -> str:
    """One sentence about a job that ended without reaching its end, and with way_out what to do now."""
    name, state = status["name"], status["state"]
    text = f'job "{name}" {state} at step {status.get("step") or 0} of {status.get("steps", "?")}'
    lines = [line for line in str(status.get("error") or "").splitlines() if line.strip()]
    why = status.get("reason") or (lines[-1].strip() if lines else "")
    if why:
        text += f": {why}"
    if not way_out:
        return text
    if state == "interrupted":
        return f"{text}; `flowctl resume {name}` goes on from the last commit"
    return f"{text}; `flowctl logs {name}` shows what its actors wrote"


def traceback_of(status: Mapping[str, Any]) -> str:
    """The traceback in a job's error, or "" where the error is just a sentence."""
    error = str(status.get("error") or "").strip("\n")
    return error if "\n" in error else ""
