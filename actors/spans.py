"""Spans of time for `flowctl trace`: a JSON line each, appended by every actor of a run to its spans.jsonl.

The file is bounded. Neighbours of the same name become one line, and a full file is set aside as spans.1.jsonl (in the
place of the one set aside before), so that the newest part is always there. The file after it says in a line of its
own, {"since": T}, when that was: whatever ended before T may be missing once its part is gone.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import msgspec

FLUSH_LINES = 64
FLUSH_S = 1.0
MERGE_GAP_S = 0.005  # shorter than that between two spans is not worth a line
PART_BYTES = 16 << 20  # two parts are kept: about 250,000 spans, what a viewer still opens


class SpanWriter:
    """Buffers lines and appends them in one write: O_APPEND keeps lines of several processes whole.

    The file is opened anew each time, because another process may have set it aside.
    """

    def __init__(self, path: Path, actor: str, *, part_bytes: int = PART_BYTES) -> None:
        self._path = path
        self._actor = actor
        self._part_bytes = part_bytes
        self._lines: list[bytes] = []
        self._last: _Span | None = None  # may grow still
        self._flushed = time.monotonic()

    def add(self, name: str, start: float, seconds: float) -> None:
        """start: unix seconds. One that follows its like at once makes that longer, and is counted in it."""
        end = start + seconds
        last = self._last
        if last is not None and last.name == name and 0 <= start - last.end < MERGE_GAP_S:
            last.end = end
            last.busy_s += seconds
            last.count += 1
        else:
            self._end_last()
            self._last = _Span(name, start, end, seconds)
        if len(self._lines) >= FLUSH_LINES or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        self._flushed = time.monotonic()
        self._end_last()
        if not self._lines:
            return
        text = b"".join(self._lines)
        self._lines.clear()
        with self._path.open("ab", buffering=0) as file:
            file.write(text)
            if file.tell() > self._part_bytes:
                self._set_aside(file.fileno())

    def close(self) -> None:
        """Write what is buffered."""
        self.flush()

    def _end_last(self) -> None:
        span, self._last = self._last, None
        if span is None:
            return
        args: dict[str, Any] = {}
        if span.count > 1:
            args = {"spans": span.count, "busy_s": round(span.busy_s, 6)}
        line = {
            "actor": self._actor,
            "name": span.name,
            "start": round(span.start, 6),
            "seconds": round(span.end - span.start, 6),
            "args": args,
        }
        self._lines.append(msgspec.json.encode(line) + b"\n")

    def _set_aside(self, descriptor: int) -> None:
        """Make the open file the older part, unless another process does so or has done so."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            if not os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                return
        except FileNotFoundError:
            return  # set aside a moment ago, and nobody has written since
        os.replace(self._path, older_part(self._path))
        with self._path.open("ab", buffering=0) as file:
            file.write(msgspec.json.encode({"since": time.time()}) + b"\n")


class _Span:
    """What was done under one name without a pause. start, end: unix seconds; busy_s: without the gaps"""

    __slots__ = ("busy_s", "count", "end", "name", "start")

    def __init__(self, name: str, start: float, end: float, busy_s: float) -> None:
        self.name = name
        self.start = start
        self.end = end
        self.busy_s = busy_s
        self.count = 1


def older_part(path: Path) -> Path:
    """Where the part before is: spans.jsonl → spans.1.jsonl."""
    return path.with_suffix(f".1{path.suffix}")
