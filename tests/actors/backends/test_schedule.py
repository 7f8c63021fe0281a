"""The learning rate by hand."""

import pytest

from actors.backends.schedule import learning_rate
from actors.trainer.config import TrainerConfig


def rates(config: TrainerConfig, steps: int, total_steps: int) -> list[float]:
    return [learning_rate(config, step, total_steps) for step in range(steps)]


def test_it_rises_linearly_and_stays():
    """The first step has a rate already; the last of the rise is the peak."""
    config = TrainerConfig(learning_rate=0.4, lr_warmup_steps=4)
    assert rates(config, 6, 100) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_the_cosine_ends_at_its_fraction_with_the_job():
    """From the peak after the rise to the last step, and not below where a run goes on."""
    config = TrainerConfig(
        learning_rate=1.0, lr_warmup_steps=1, lr_schedule="cosine", lr_min_fraction=0.2
    )
    # Steps 1 to 5 are 0, 1/4, 1/2, 3/4 and all of half a cosine.
    expected = [1.0, 1.0, 0.2 + 0.8 * 0.853553, 0.6, 0.2 + 0.8 * 0.146447, 0.2, 0.2, 0.2]
    assert rates(config, 8, 6) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_jobs_shorter_than_the_rise_have_a_rate(total_steps: int):
    """No division by zero where nothing is left for the cosine."""
    config = TrainerConfig(learning_rate=1.0, lr_warmup_steps=2, lr_schedule="cosine")
    assert all(0 < rate <= 1 for rate in rates(config, 5, total_steps))
