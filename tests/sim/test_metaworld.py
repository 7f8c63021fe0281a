"""Meta-World through the contract; where it is not installed, what is said."""

import importlib.util
from functools import partial

import numpy as np
import pytest

from sim.checker import check
from sim.errors import MissingDependency, SimError
from sim.metaworld import MetaWorld

needs_metaworld = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="Meta-World is not installed: make install-robots, make test-robots",
)
close_drawer = partial(MetaWorld, env_name="drawer-close-v3", size=32)


@needs_metaworld
def test_it_keeps_the_contract() -> None:
    """Bit for bit, pictures taken in between or not."""
    checked = check(
        partial(close_drawer, max_steps=10),
        uncut=partial(close_drawer, max_steps=15),
        seeds=(0, 2**62),
    )
    assert checked.ended == checked.episodes


@needs_metaworld
def test_seeds_place_the_drawer() -> None:
    """Unlike in Meta-World's own reset; the goal is seen."""
    env = close_drawer(2)
    goals = [each["state"][36:] for each in env.reset([0, 1], [1, 2])]
    assert abs(goals[0][0] - goals[1][0]) > 0.001
    assert (np.abs(goals) > 0).all()


@needs_metaworld
def test_pushing_the_drawer_succeeds() -> None:
    """Both definitions of success; the episode goes on to its limit."""
    env = close_drawer(1, max_steps=100)
    (observation,) = env.reset([0], [3])
    infos = []
    for step in range(100):
        hand, drawer = observation["state"][:3], observation["state"][4:7]
        away = (0.0, -0.2, 0.15) if step < 30 else (0.0, -0.06, -0.02)
        target = drawer + np.array(away if step < 45 else (0.0, 0.2, -0.02))
        move = np.clip(np.append((target - hand) * 15, -1.0), -1.0, 1.0).astype(np.float32)
        (result,) = env.step([0], [move])
        observation = result.observation
        infos.append((result.info["success_once"], result.info["success_at_end"]))
    assert result.truncated
    assert infos[0] == (0.0, 0.0)
    assert infos[-1] == (1.0, 1.0)


@needs_metaworld
def test_unknown_tasks_and_lengths_are_refused() -> None:
    """With the near names."""
    with pytest.raises(
        SimError, match=r'"drawer-close-v2": Meta-World has no such task.*drawer-close-v3'
    ):
        MetaWorld(1, "drawer-close-v2")
    with pytest.raises(ValueError, match="max_steps = 501: Meta-World allows 1 to 500"):
        MetaWorld(1, "drawer-close-v3", max_steps=501)


@pytest.mark.skipif(importlib.util.find_spec("metaworld") is not None, reason="it is installed")
def test_without_the_package_the_command_is_named() -> None:
    """One sentence with the way out."""
    with pytest.raises(MissingDependency, match="needs the module metaworld: make install-robots"):
        MetaWorld(1, "drawer-close-v3")
