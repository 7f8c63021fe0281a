"""Rows from JSON lines and Parquet: read in place, bad ones told with file and line."""

import json
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sim.errors import BadTaskData, MissingDependency
from sim.text.rows import Rows

ROWS = [{"n": n, "text": f"zwölf {n}\n"} for n in range(5)]


def everything(row: Any, where: str) -> bool:
    return True


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:2]) + "\n\n")
    with path.open("a") as file:
        file.write("\n".join(map(json.dumps, ROWS[2:])))  # no line end after the last
    return path


def test_any_row_of_json_lines(lines: Path) -> None:
    """In any order; blank lines count as lines and are no rows."""
    rows = Rows(lines, everything)
    assert [rows[i] for i in (4, 0, 2, 1, 3)] == [ROWS[i] for i in (4, 0, 2, 1, 3)]
    assert [rows.where(i) for i in (1, 2)] == [f"{lines}, line 2", f"{lines}, line 4"]
    rows.close()


def test_rows_that_are_not_kept_are_not_there(lines: Path) -> None:
    """Their lines still count."""
    rows = Rows(lines, lambda row, where: row["n"] % 2 == 1)
    assert [rows[i]["n"] for i in range(len(rows))] == [1, 3]
    assert rows.where(1) == f"{lines}, line 5"
    rows.close()


def test_rows_appended_later_do_not_disturb(lines: Path) -> None:
    """The file is read where its rows were; a row that is gone is told."""
    rows = Rows(lines, everything)
    with lines.open("a") as file:
        file.write('\n{"n": 9}\n')
    assert (len(rows), rows[4]) == (5, ROWS[4])
    lines.write_text("{}\n")
    with pytest.raises(BadTaskData, match=r"rows.jsonl, line 6: each line must be one JSON object"):
        rows[4]
    rows.close()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: each line must be one JSON object in UTF-8"),
        (b'{"text": "\xff"}', "line 2: each line must be one JSON object in UTF-8"),
        (b"[1, 2]", r"line 2: each line must be a JSON object, and this is b'\[1, 2\]"),
    ],
)
def test_bad_line_is_told_at_once(tmp_path: Path, line: bytes, message: str) -> None:
    """File, line, and what is wrong with it."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(BadTaskData, match=message) as caught:
        Rows(path, everything)
    assert str(path) in str(caught.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Missing, or of a kind that is not known."""
    with pytest.raises(BadTaskData, match=r"none.jsonl: cannot be read \(No such file"):
        Rows(tmp_path / "none.jsonl", everything)
    with pytest.raises(ValueError, match=r"rows.csv: the name must end in one of .jsonl"):
        Rows(tmp_path / "rows.csv", everything)


def test_parquet(tmp_path: Path) -> None:
    """The same rows from several row groups, of the columns that are needed; dates and decimals as text."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    table = [
        {**row, "more": {"day": date(2024, 1, n + 1), "price": Decimal("1.50")}, "unused": b"\0"}
        for n, row in enumerate(ROWS)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=2)
    rows = Rows(path, everything, columns=["n", "text", "more"])
    assert [rows[i]["n"] for i in (3, 0)] == [3, 0]
    assert rows[1] == {**ROWS[1], "more": {"day": "2024-01-02", "price": "1.50"}}
    assert rows.where(1) == f"{path}, row 2"
    rows.close()
    with pytest.raises(BadTaskData, match=r'there is no column "m"; it has \[.n., .text.'):
        Rows(path, everything, columns=["m"])
    with pytest.raises(BadTaskData, match="a value of type bytes"):
        Rows(path, everything)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(BadTaskData, match="cannot be read as Parquet"):
        Rows(path, everything)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those who have Parquet need it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"pip install 'flowd\[data\]'"):
        Rows(tmp_path / "rows.parquet", everything)
