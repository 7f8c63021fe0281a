"""What bench.calls makes of its figures, and one short run of it; what it measures is for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.calls import judged

FIGURES = {
    "call_us_p50": 130.0,
    "raw_call_us_p50": 100.0,
    "ray_call_us_p50": 390.0,
    "brokered_call_us_p50": 230.0,
    "calls_per_s": 60.0,
    "raw_calls_per_s": 100.0,
    "ray_calls_per_s": 4.0,
    "dead_peer_call_ms": 50.0,
}


def test_a_bar_is_reached_by_standing_on_it():
    """130 is 1.3 of 100 and a third of 390, 230 is 2.3 of 100, 60 is 0.6 of 100 and 15 of 4."""
    result = judged(FIGURES)
    assert result["call_over_raw"] == pytest.approx(1.3)
    assert result["calls_per_s_over_ray"] == pytest.approx(15)
    assert result["bar_reached"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("call_us_p50", 131.0),
        ("ray_call_us_p50", 389.0),
        ("brokered_call_us_p50", 231.0),
        ("calls_per_s", 59.0),
        ("ray_calls_per_s", 4.1),
        ("dead_peer_call_ms", 51.0),
    ],
)
def test_each_bar_counts(key, value):
    """One figure that falls short is enough."""
    assert judged(FIGURES | {key: value})["bar_reached"] is False


def test_without_ray_its_figures_are_null_and_say_why():
    """What was not measured neither reaches a bar nor misses it."""
    figures = {key: value for key, value in FIGURES.items() if "ray" not in key}
    result = judged(figures)
    assert result["ray_call_us_p50"] is result["call_over_ray"] is None
    assert "flowd[bench]" in result["ray"]
    assert result["bar_reached"] is True


def test_every_figure_of_the_table_is_measured():
    """A run with few calls gives them all: its exit code says only whether the machine was quiet."""
    command = [sys.executable, "-m", "bench.calls", "--json", "--rounds", "1", "--calls", "20"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert {key for key in FIGURES if result.get(key) is None} <= {
        "ray_call_us_p50",
        "ray_calls_per_s",
    }
    assert all(result[key] > 0 for key in FIGURES if result[key] is not None)
