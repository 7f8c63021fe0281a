"""What ends a job with a reason."""

import math

import pytest

from actors.conductor.config import GuardsConfig
from actors.conductor.guards import Guards, no_progress
from channels.work import InCall

VARIED = [0.0, 1.0]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_job(name: str, value: float) -> None:
    """The sentence names the metric, its value, and what to do."""
    why = Guards(GuardsConfig()).check({name: value}, VARIED)
    assert why is not None
    assert why.startswith(f"{name} is {value}")
    assert "lower trainer.learning_rate" in why


def test_finite_numbers_pass() -> None:
    """Also large ones, and a step that reports none of them."""
    guards = Guards(GuardsConfig())
    assert guards.check({"loss": 1e30, "grad_norm": 1e30, "kl_sampler": 1e30}, VARIED) is None
    assert guards.check({}, VARIED) is None


def test_kl_above_its_limit_stops_the_job() -> None:
    """The limit itself is allowed; above it the value and the limit are named."""
    guards = Guards(GuardsConfig(max_kl=0.5))
    assert guards.check({"kl_sampler": 0.5}, VARIED) is None
    why = guards.check({"kl_sampler": 0.75}, VARIED)
    assert why is not None
    assert "0.75" in why
    assert "guards.max_kl = 0.5" in why


def test_kl_that_is_no_number_is_above_any_limit() -> None:
    """A NaN compares false with everything, and must not pass for small."""
    assert Guards(GuardsConfig(max_kl=0.5)).check({"kl_sampler": math.nan}, VARIED) is not None
    assert Guards(GuardsConfig(max_kl=None)).check({"kl_sampler": 9.0}, VARIED) is None


def test_constant_reward_stops_the_job_at_exactly_so_many_steps() -> None:
    """One step short of the number goes on; the number itself ends it, with the value."""
    guards = Guards(GuardsConfig(constant_reward_steps=3))
    assert guards.check({}, [0.25, 0.25]) is None
    assert guards.check({}, [0.25]) is None
    why = guards.check({}, [0.25, 0.25, 0.25])
    assert why is not None
    assert "last 3 steps had the reward 0.25" in why


def test_one_different_sample_starts_the_count_again() -> None:
    """A single other reward in a step means that there is something to learn from."""
    guards = Guards(GuardsConfig(constant_reward_steps=2))
    assert guards.check({}, [0.0, 0.0]) is None
    assert guards.check({}, [0.0, 1.0]) is None
    assert guards.check({}, [0.0, 0.0]) is None
    assert guards.check({}, [0.0, 0.0]) is not None


def test_another_constant_starts_the_count_again() -> None:
    """All 0, then all 1: the reward moved between the steps; the count begins with the new value."""
    guards = Guards(GuardsConfig(constant_reward_steps=3))
    assert guards.check({}, [0.0, 0.0]) is None
    assert guards.check({}, [0.0, 0.0]) is None
    assert guards.check({}, [1.0, 1.0]) is None
    assert guards.check({}, [1.0, 1.0]) is None
    assert guards.check({}, [1.0, 1.0]) is not None


def test_constant_reward_guard_can_be_off() -> None:
    """0 turns it off."""
    guards = Guards(GuardsConfig(constant_reward_steps=0))
    assert all(guards.check({}, [1.0]) is None for _ in range(500))


def test_a_step_without_samples_says_nothing() -> None:
    """It neither counts nor starts the count again."""
    guards = Guards(GuardsConfig(constant_reward_steps=2))
    assert guards.check({}, [1.0]) is None
    assert guards.check({}, []) is None
    assert guards.check({}, [1.0]) is not None


def test_no_progress_names_who_hangs_longest_first() -> None:
    """Calls that began lately are no suspects; who does not answer is; a long list is cut."""
    calls: dict[str, InCall | None] = {
        "rollout-0": InCall(call="Engine.step at engine.py:7", seconds=0.2),
        "trainer-0": InCall(call="", seconds=0.0),
        "env-0": InCall(call="Arm.step at arm.py:12", seconds=61.0),
        "env-1": InCall(call="Arm.reset at arm.py:40", seconds=598.4),
    }
    assert no_progress(60, calls) == (
        "no trainer step for 60 s (guards.no_progress_s): "
        "env-1 has been in one blocking call for 598 s (Arm.reset at arm.py:40); "
        "env-0 has been in one blocking call for 61 s (Arm.step at arm.py:12); "
        "`flowctl status` says what each actor waits for"
    )
    assert "no actor hangs in a call" in no_progress(1800, calls)
    silent = dict.fromkeys(("env-2", "env-3"))
    sentence = no_progress(60, {**calls, **silent})
    assert "env-2 does not answer; and 1 more; " in sentence
