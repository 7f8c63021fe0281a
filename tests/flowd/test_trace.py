"""Timelines that Perfetto opens."""

import json

from hypothesis import given
from hypothesis import strategies as st

from flowd.trace import chrome_trace

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
