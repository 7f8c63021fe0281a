"""What bench.tensors makes of its figures, and one short run of it; what it measures is for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.tensors import IN_PLACE_BYTES, judged

HANDOFFS = dict.fromkeys(IN_PLACE_BYTES, 500.0)
FIGURES = {
    "memcpy_gb_per_s": 10.0,
    "shm_64mb_gb_per_s": 8.5,
    "gloo_64mb_gb_per_s": 2.0,
    "tcp_64mb_gb_per_s": 1.2,
    "tcp_curve_64mb_gb_per_s": 0.2,
    "tcp_plain_bulk_64mb_gb_per_s": 0.5,
    "ray_64mb_gb_per_s": 0.85,
    "item_us_p50": 300.0,
    "inplace_handoff_us": HANDOFFS,
}


def test_a_bar_is_reached_by_standing_on_it():
    """8.5 is 0.85 of 10 and ten times 0.85, 1.2 is 0.6 of 2."""
    result = judged(FIGURES)
    assert result["shm_over_memcpy"] == pytest.approx(0.85)
    assert result["tcp_over_gloo"] == pytest.approx(0.6)
    assert result["bar_reached"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shm_64mb_gb_per_s", 8.4),
        ("tcp_64mb_gb_per_s", 1.1),
        ("ray_64mb_gb_per_s", 0.9),
        ("item_us_p50", 301.0),
        ("inplace_handoff_us", HANDOFFS | {"64_mib": 501.0}),
    ],
)
def test_each_bar_counts(key, value):
    """One figure that falls short is enough, one size among the others too."""
    assert judged(FIGURES | {key: value})["bar_reached"] is False


def test_what_could_not_be_measured_is_null():
    """A size without room, and Ray."""
    figures = {key: value for key, value in FIGURES.items() if "ray" not in key}
    result = judged(figures | {"inplace_handoff_us": HANDOFFS | {"1_gib": None}})
    assert result["ray_64mb_gb_per_s"] is result["shm_over_ray"] is None
    assert "flowd[bench]" in result["ray"]
    assert result["bar_reached"] is True


def test_every_figure_of_the_table_is_measured():
    """One round gives them all; its exit code says only whether the machine was quiet."""
    command = [sys.executable, "-m", "bench.tensors", "--json", "--rounds", "1", "--no-gib"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=90
    )
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    for key in FIGURES.keys() - {"ray_64mb_gb_per_s", "inplace_handoff_us"}:
        assert result[key] > 0
    assert [name for name, us in result["inplace_handoff_us"].items() if us is None] == ["1_gib"]
