"""The arithmetic of bench.embodied, and its echo through a real job; rates are for a quiet machine."""

import pytest

from bench.embodied import ECHO, reached, summarize
from bench.embodied_echo import WARM_IN_STEPS, Echo


def test_rates_are_medians_and_what_is_skipped_has_a_reason() -> None:
    """Three rounds; without stable-baselines3 its ratios are left out."""
    one = {"success_at_end": 0.9}
    rounds = {
        "loop": [{"steps_per_s": rate, **one} for rate in (100.0, 3.0, 110.0)],
        "sb3": [{"skipped": "not installed"}] * 3,
        "flowd": [{"steps_per_s": rate, **one} for rate in (90.0, 95.0, 1.0)],
        "flowd_pipelined": [{"steps_per_s": rate, **one} for rate in (170.0, 160.0, 150.0)],
    }
    result = summarize(rounds)
    assert (result["loop_steps_per_s"], result["flowd_steps_per_s"]) == (100.0, 90.0)
    assert (result["sb3_steps_per_s"], result["sb3_skipped"]) == (None, "not installed")
    assert result["flowd_pipelined_over_loop"] == pytest.approx(1.6)
    assert result["flowd_success_at_end"] == 0.9
    assert not [key for key in result if key.endswith("over_sb3")]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"flowd_pipelined_over_loop": 1.49}, False),
        ({"flowd_pipelined_over_sb3": 1.19}, False),
        ({"flowd_over_sb3": 0.99}, False),
        ({"step_latency_us_p50": 1001.0}, False),
    ],
)
def test_each_bar_counts(changed: dict[str, float], expected: bool) -> None:
    """Pipelined over the loop and over SB3, on-policy over SB3, and the latency."""
    numbers = {
        "flowd_pipelined_over_loop": 1.5,
        "flowd_pipelined_over_sb3": 1.2,
        "flowd_over_sb3": 1.0,
        "step_latency_us_p50": 1000.0,
    }
    assert reached(numbers | changed) is expected


def test_the_echo_tells_its_quantiles_at_the_end() -> None:
    """Of an observation of 50,000 bytes, as the job of the bench says it."""
    env = Echo(1, max_steps=WARM_IN_STEPS + 20)
    assert f"state = {list(env.observation_space['state'].shape)}" in ECHO
    (observation,) = env.reset([0], [1])
    assert observation["state"].nbytes == 50_000
    results = [env.step([0], [None])[0] for _ in range(WARM_IN_STEPS + 20)]  # type: ignore[list-item]
    assert [r.truncated for r in results] == [False] * (WARM_IN_STEPS + 19) + [True]
    assert all(not r.info for r in results[:-1])
    info = results[-1].info
    assert 0 < info["latency_us_p50"] <= info["latency_us_p90"] <= info["latency_us_p99"]
