"""What actors did, in a file that several of them append to and that stays small."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from actors.spans import SpanWriter, older_part


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_neighbours_of_a_kind_become_one_line(tmp_path: Path) -> None:
    """Counted, with the time that the gaps leave; another name, a longer gap or an overlap begins a new one."""
    path = tmp_path / "spans.jsonl"
    writer = SpanWriter(path, "rollout-0")
    for start in (100.0, 100.012, 100.024):
        writer.add("generate", start, 0.01)
    writer.add("generate", 100.1, 0.01)
    writer.add("generate", 100.105, 0.01)  # while the one before lasts
    writer.add("adopt", 100.116, 0.01)
    writer.close()
    seen = [(s["name"], s["start"], s["seconds"], s["args"]) for s in lines_of(path)]
    assert seen == [
        ("generate", 100.0, 0.034, {"spans": 3, "busy_s": 0.03}),
        ("generate", 100.1, 0.01, {}),
        ("generate", 100.105, 0.01, {}),
        ("adopt", 100.116, 0.01, {}),
    ]
    assert {s["actor"] for s in lines_of(path)} == {"rollout-0"}


def test_a_span_that_was_written_is_not_made_longer(tmp_path: Path) -> None:
    """What comes after a flush has a line of its own: lines are never changed."""
    writer = SpanWriter(tmp_path / "spans.jsonl", "env-0")
    writer.add("step", 1.0, 0.5)
    writer.flush()
    writer.add("step", 1.5, 0.5)
    writer.close()
    starts = [span["start"] for span in lines_of(tmp_path / "spans.jsonl")]
    assert starts == [1.0, 1.5]


def write_many(path: Path, actor: str, count: int, part_bytes: int) -> None:
    writer = SpanWriter(path, actor, part_bytes=part_bytes)
    for number in range(count):
        writer.add("step", float(number), 0.5)
        if number % 7 == 0:
            writer.flush()
    writer.close()


@pytest.mark.parametrize("part_bytes", [4000, 1 << 20])
def test_several_processes_keep_the_newest_part(tmp_path: Path, part_bytes: int) -> None:
    """Two parts at most; lines stay whole; of each writer nothing is missing after the oldest that is kept."""
    path, count = tmp_path / "spans.jsonl", 600
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=write_many, args=(path, f"env-{number}", count, part_bytes))
        for number in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60.0)
        assert writer.exitcode == 0
    parts = [part for part in (older_part(path), path) if part.exists()]
    assert sorted(tmp_path.iterdir()) == sorted(parts)
    lines = [line for part in parts for line in lines_of(part)]
    kept: dict[str, list[float]] = {}
    for line in lines:
        if "since" not in line:
            kept.setdefault(line["actor"], []).append(line["start"])
    dropped = part_bytes == 4000
    for starts in kept.values():
        assert starts == [float(number) for number in range(count)][-len(starts) :]
        assert (len(starts) < count) == dropped
    # A writer overshoots by what it had buffered.
    assert all(part.stat().st_size < part_bytes + 3 * 64 * 120 for part in parts)
    assert any("since" in line for line in lines_of(parts[0])) == dropped
