"""Spans of time for `flowctl trace`: one JSON line each, appended by every actor to the run's spans.jsonl."""

import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

FLUSH_LINES = 64
FLUSH_S = 1.0


class SpanWriter:
    """Buffers lines and appends them in one write: O_APPEND keeps lines of several processes whole."""

    def __init__(self, path: Path, actor: str) -> None:
        self._path = path
        self._actor = actor
        self._lines: list[bytes] = []
        self._file: BinaryIO | None = None
        self._flushed = time.monotonic()

    def add(self, name: str, start: float, seconds: float, **args: Any) -> None:
        """start: unix seconds."""
        line = {"actor": self._actor, "name": name, "start": round(start, 6)}
        self._append({**line, "seconds": round(seconds, 6), "args": args})

    def add_lease(self, device: str, holder: str, start: float, seconds: float) -> None:
        """Who held a device, and for how long."""
        self._append({"device": device, "name": holder, "start": start, "seconds": seconds})

    def _append(self, line: dict[str, Any]) -> None:
        self._lines.append(msgspec.json.encode(line))
        if len(self._lines) >= FLUSH_LINES or time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered."""
        self._flushed = time.monotonic()
        if not self._lines:
            return
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        self._file.write(b"\n".join(self._lines) + b"\n")
        self._lines.clear()

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
