"""Rows of a data file, read one at a time: where each begins is kept in memory, the rows stay on disk.

JSON lines are read in place. Parquet keeps columns together, so that one row costs a whole row group: such a file is
written once, as JSON lines, into a temporary file without a name, which is gone when the process is.
"""

import contextlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

from sim.errors import BadTaskData, MissingDependency

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet", ".pq")
ROWS_AT_A_TIME = 1024  # of a Parquet file, while it is written out

Row = Mapping[str, Any]


class Rows:
    """The rows of a file for which `keep(row, where)` was true, in the order of the file.

    Every row is parsed once, here, so that a bad one is told at the start and not in the middle of a job.
    columns: of Parquet, those that are needed

    BadTaskData: the file cannot be read or a row is no JSON object; it says file, line and what is wrong.
    MissingDependency: a Parquet file, and pyarrow is not installed.
    """

    def __init__(
        self, path: str | Path, keep: Callable[[Row, str], bool], *, columns: Collection[str] = ()
    ) -> None:
        self._path = Path(path)
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._numbers = array("Q")
        suffix = self._path.suffix.lower()
        if suffix not in JSON_LINES + PARQUET:
            raise ValueError(
                f"{path}: the name must end in one of {', '.join(JSON_LINES + PARQUET)}, "
                "which says how to read it"
            )
        self._unit = "row" if suffix in PARQUET else "line"
        self._file = self._open(columns)
        self.close = weakref.finalize(self, self._file.close)  # at the latest when nobody uses us
        self._index(keep)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Row:
        """Read one row. BadTaskData: the file was changed since it was opened."""
        line = os.pread(self._file.fileno(), self._lengths[index], self._offsets[index])
        return parse(line, self.where(index))

    def where(self, index: int) -> str:
        """The place of a row, as people look it up."""
        return self._place(self._numbers[index])

    def _place(self, number: int) -> str:
        return f"{self._path}, {self._unit} {number}"

    def _open(self, columns: Collection[str]) -> BinaryIO:
        try:
            return (
                _written_out(self._path, columns) if self._unit == "row" else self._path.open("rb")
            )
        except OSError as error:
            raise BadTaskData(
                f"{self._path}: cannot be read ({error.strerror or error}); "
                "give the path of a JSON lines or Parquet file"
            ) from error

    def _index(self, keep: Callable[[Row, str], bool]) -> None:
        offset = 0
        for number, line in enumerate(self._file, start=1):
            where = self._place(number)
            if line.strip() and keep(parse(line, where), where):
                self._offsets.append(offset)
                self._lengths.append(len(line))
                self._numbers.append(number)
            offset += len(line)


def parse(line: bytes, where: str) -> dict[str, Any]:
    """One line as a JSON object. BadTaskData says where it stands and what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadTaskData(f"{where}: each line must be one JSON object in UTF-8: {error}") from None
    if not isinstance(row, dict):
        raise BadTaskData(f"{where}: each line must be a JSON object, and this is {line[:60]!r}")
    return row


def _written_out(path: Path, columns: Collection[str]) -> BinaryIO:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependency(
            f"{path}: reading Parquet needs pyarrow, and importing it failed ({error}): "
            "pip install 'flowd[data]', or pip install pyarrow"
        ) from error
    with contextlib.ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile(prefix="flowd-rows-"))
        try:
            table = stack.enter_context(pyarrow.parquet.ParquetFile(path))
            known = table.schema_arrow.names
            for column in columns:
                if column not in known:
                    raise BadTaskData(f'{path}: there is no column "{column}"; it has {known}')
            for row in _batches(table, list(columns) or None):
                spool.write(json.dumps(row, default=_plain).encode() + b"\n")
        except (pyarrow.ArrowException, TypeError) as error:
            raise BadTaskData(f"{path}: cannot be read as Parquet: {error}") from error
        spool.flush()
        spool.seek(0)
        stack.pop_all()
        return spool


def _batches(table: Any, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    for batch in table.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
        yield from batch.to_pylist()


def _plain(value: Any) -> Any:
    """What JSON has no type for."""
    if isinstance(value, date):  # and datetime, which is one
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be part of a row")
