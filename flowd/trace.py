"""Turns a job's spans into the Chrome trace format, which Perfetto (https://ui.perfetto.dev) opens.

Format: "Trace Event Format", Google, complete ("X") and metadata ("M") events.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flowd.errors import FlowdError
from flowd.paths import RunPaths
from flowd.runs import json_lines

DEVICES = "devices"


def read_spans(run_paths: RunPaths, missing: str) -> tuple[list[dict[str, Any]], float | None]:
    """The spans that a run has kept, and since when they are all there; None: nothing was dropped.

    missing: what to say when there are none. What ended before that time (unix seconds) may be absent.
    """
    while True:
        newest = _inode(run_paths.spans)
        parts = [path for path in (run_paths.spans_before, run_paths.spans) if path.exists()]
        lines = [list(json_lines(path, missing)) for path in parts]
        if _inode(run_paths.spans) == newest:  # else a part was set aside while we read
            break
    if not parts:
        raise FlowdError(missing)
    # Only what came before the oldest part is gone.
    since = [line["since"] for line in lines[0] if "since" in line]
    spans = [line for part in lines for line in part if "since" not in line]
    return spans, max(since, default=None)


def chrome_trace(
    spans: Iterable[Mapping[str, Any]], complete_from: float | None = None
) -> dict[str, Any]:
    """A process per actor, and a process "devices" with a thread per device that shows the leases.

    spans: {"actor", "name", "start", "seconds", "args"} for what an actor did, {"device", "name"
    (the replica that held it), "start", "seconds"} for a lease; start in unix seconds. In the
    trace, times are microseconds from the earliest start. Spans of one actor that overlap without one
    containing the other get threads ("lanes") of their own, because a thread's spans must nest.
    complete_from: unix seconds, as `read_spans` gives it; marked by an instant event across the timeline.
    """
    ordered = sorted(spans, key=lambda span: (span["start"], -span["seconds"]))
    starts = [ordered[0]["start"]] if ordered else []
    origin = min(starts + ([] if complete_from is None else [complete_from]), default=0.0)
    actors = sorted({span["actor"] for span in ordered if "actor" in span})
    process_ids = {name: number for number, name in enumerate([DEVICES, *actors], 1)}
    devices = sorted({span["device"] for span in ordered if "device" in span}, key=_natural)
    thread_ids = {name: number for number, name in enumerate(devices, 1)}
    lanes: dict[str, list[list[float]]] = {}
    events = [_name("process_name", pid, 0, name) for name, pid in process_ids.items()]
    events += [
        _name("thread_name", process_ids[DEVICES], t, name) for name, t in thread_ids.items()
    ]
    if complete_from is not None:
        events.append(
            {
                "name": "complete from here: older spans were dropped",
                "ph": "i",
                "s": "g",
                "ts": round((complete_from - origin) * 1e6, 3),
                "pid": process_ids[DEVICES],
                "tid": 0,
            }
        )
    for span in ordered:
        if "device" in span:
            process, thread = process_ids[DEVICES], thread_ids[span["device"]]
        else:
            process = process_ids[span["actor"]]
            thread = _lane(lanes.setdefault(span["actor"], []), span["start"], span["seconds"])
        events.append(
            {
                "name": span["name"],
                "ph": "X",
                "ts": round((span["start"] - origin) * 1e6, 3),
                "dur": round(span["seconds"] * 1e6, 3),
                "pid": process,
                "tid": thread,
                "args": dict(span.get("args") or {}),
            }
        )
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"origin_unix_s": origin, "complete_from_unix_s": complete_from},
    }


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _lane(open_ends: list[list[float]], start: float, seconds: float) -> int:
    """The first lane where a span nests; open_ends: per lane the ends of spans that may be open."""
    end = start + seconds
    for number, ends in enumerate(open_ends, 1):
        while ends and ends[-1] <= start:
            ends.pop()
        if not ends or end <= ends[-1]:
            ends.append(end)
            return number
    open_ends.append([end])
    return len(open_ends)


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _natural(device: str) -> tuple[str, float]:
    """cpu:10 after cpu:9."""
    kind, _, index = device.partition(":")
    try:
        return kind, float(index or 0)
    except ValueError:
        return device, 0.0
