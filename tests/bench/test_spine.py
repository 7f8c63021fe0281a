"""The arithmetic of bench.spine; what it measures is for a quiet machine."""

import pytest

from bench.spine import control_fraction, reached, rotated, summarize


def test_every_way_comes_first_equally_often():
    """Over as many rounds as there are ways, each way has each place once."""
    orders = [rotated(["a", "b", "c"], number) for number in range(3)]
    assert [list(place) for place in zip(*orders, strict=True)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_each_way_counts_with_what_suits_it_best():
    """Medians over rounds; one round that another process spoiled changes nothing."""
    result = summarize(
        {
            "sequential_1": [100.0, 102.0, 3.0],
            "sequential_2": [60.0, 61.0, 62.0],
            "sync_1": [95.0, 90.0, 1.0],
            "sync_2": [60.0, 70.0, 80.0],
            "async_1": [120.0, 2.0, 160.0],
            "async_2": [150.0, 150.0, 160.0],
        }
    )
    assert result["best"] == {"sequential": "sequential_1", "sync": "sync_1", "async": "async_2"}
    assert result["sequential_groups_per_s"] == 100.0
    assert result["async_over_sequential"] == pytest.approx(1.5)
    assert result["sync_over_sequential"] == pytest.approx(0.9)


def test_control_overhead_counts_daemon_zygote_and_conductor():
    """2 s of daemon, zygote and conductor of 10 s in all."""
    seconds = {"daemon": 0.5, "conductor": 1.5, "trainer": 5.0, "rollout": 2.0, "env": 1.0}
    assert control_fraction(seconds) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("asynchronous", "synchronous", "control", "expected"),
    [
        (1.3, 0.9, 0.049, True),
        (1.29, 0.9, 0.049, False),
        (1.3, 0.89, 0.049, False),
        (1.3, 0.9, 0.05, False),
    ],
)
def test_each_bar_counts(asynchronous, synchronous, control, expected):
    """Async at least 1.3, sync at least 0.9, control below 5 %."""
    result = {
        "async_over_sequential": asynchronous,
        "sync_over_sequential": synchronous,
        "control_overhead_fraction": control,
    }
    assert reached(result) is expected
