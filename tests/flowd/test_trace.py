"""Timelines that Perfetto opens."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.spans import SpanWriter
from flowd.errors import FlowdError
from flowd.paths import RunPaths
from flowd.trace import chrome_trace, read_spans

SPANS = [
    {"actor": "trainer-0", "name": "step", "start": 100.0, "seconds": 2.0, "args": {"step": 1}},
    {"actor": "rollout-0", "name": "generate", "start": 99.5, "seconds": 1.0},
    {"device": "cpu:10", "name": "rollout-0", "start": 99.0, "seconds": 1.0},
    {"device": "cpu:9", "name": "trainer-0", "start": 100.0, "seconds": 2.0},
]


def test_actors_are_processes_and_devices_are_threads():
    """Microseconds from the earliest start; devices in their natural order."""
    trace = json.loads(json.dumps(chrome_trace(SPANS)))
    names = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"
    }
    assert names == {
        (1, 0): "devices",
        (2, 0): "rollout-0",
        (3, 0): "trainer-0",
        (1, 1): "cpu:9",
        (1, 2): "cpu:10",
    }
    step = next(e for e in trace["traceEvents"] if e["name"] == "step")
    assert (step["pid"], step["ts"], step["dur"], step["args"]) == (3, 1e6, 2e6, {"step": 1})
    lease = next(
        e for e in trace["traceEvents"] if e["ph"] == "X" and (e["pid"], e["tid"]) == (1, 2)
    )
    assert (lease["name"], lease["ts"]) == ("rollout-0", 0.0)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=20),
)
def test_spans_of_one_thread_nest(pairs):
    """The format has no meaning for spans of a thread that overlap without nesting."""
    spans = [{"actor": "a", "name": "x", "start": float(s), "seconds": float(d)} for s, d in pairs]
    events = [e for e in chrome_trace(spans)["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(spans)
    for one in events:
        for other in events:
            if one is not other and one["tid"] == other["tid"] and one["ts"] <= other["ts"]:
                one_end, other_end = one["ts"] + one["dur"], other["ts"] + other["dur"]
                same_start_nests = one["ts"] == other["ts"]
                assert other["ts"] >= one_end or other_end <= one_end or same_start_nests


def test_a_job_that_did_nothing_gives_an_empty_timeline():
    """Only the name of the devices' process."""
    assert [e["ph"] for e in chrome_trace([])["traceEvents"]] == ["M"]


def test_a_timeline_says_from_when_on_it_is_complete(tmp_path: Path) -> None:
    """Nothing was dropped while there are two parts; afterwards the moment is told, and marked in the timeline."""
    run_paths = RunPaths(tmp_path)
    with pytest.raises(FlowdError, match="none yet"):
        read_spans(run_paths, "none yet")
    writer = SpanWriter(run_paths.spans, "env-0", part_bytes=1000)
    written = 0
    while not run_paths.spans_before.exists():
        writer.add("step", float(written), 0.5)
        writer.flush()
        written += 1
    spans, complete_from = read_spans(run_paths, "")
    assert ([span["start"] for span in spans], complete_from) == (list(range(written)), None)
    first_part = run_paths.spans_before.stat().st_ino
    while run_paths.spans_before.stat().st_ino == first_part:
        writer.add("step", float(written), 0.5)
        writer.flush()
        written += 1
    spans, complete_from = read_spans(run_paths, "")
    assert 0 < len(spans) < written
    assert [span["start"] for span in spans] == list(range(written))[-len(spans) :]
    assert complete_from is not None
    trace = chrome_trace(spans, complete_from)
    (mark,) = [e for e in trace["traceEvents"] if e["ph"] == "i"]
    origin = trace["otherData"]["origin_unix_s"]
    assert mark["ts"] == pytest.approx((complete_from - origin) * 1e6)
    assert trace["otherData"]["complete_from_unix_s"] == complete_from
    run_paths.spans.unlink()  # between setting a part aside and writing the next one
    assert read_spans(run_paths, "")[1] == complete_from
