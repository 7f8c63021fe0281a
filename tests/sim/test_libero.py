"""LIBERO through the contract; where it or its assets are not there, what is said."""

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.checker import check
from sim.contract import counted_seed
from sim.errors import MissingDependency, SimError
from sim.libero import STEP_LIMITS, Libero

# The packages warn of what NumPy and Gymnasium will change.
pytestmark = pytest.mark.filterwarnings("default")
ASSETS = Path(__file__).parents[2] / "../shared/data/libero/assets"
installed = importlib.util.find_spec("libero") is not None
needs_package = pytest.mark.skipif(
    not installed, reason="LIBERO is not installed: make install-robots, make test-robots"
)
needs_assets = pytest.mark.skipif(
    not (installed and ASSETS.is_dir()), reason=f"needs LIBERO and its assets in {ASSETS}"
)
milk = partial(Libero, suite="libero_object", tasks=[7], path=str(ASSETS))


@needs_assets
@pytest.mark.timeout(900)
def test_it_keeps_the_contract() -> None:
    """Bit for bit, from two initial states, without pictures; the last observation of a cut is the true one."""
    make = partial(milk, image_size=0, settle_steps=3)
    checked = check(
        partial(make, max_steps=3), uncut=partial(make, max_steps=4), max_steps=5, seeds=(0, 1)
    )
    assert checked.ended == checked.episodes


@needs_assets
@pytest.mark.timeout(600)
def test_pictures_are_the_right_way_up_and_seeds_name_task_and_state() -> None:
    """Tasks first, then their initial states; the robot's wall is above the floor."""
    env = Libero(1, "libero_object", tasks=[7, 2], image_size=64, path=str(ASSETS))
    seen = [env.reset([0], [counted_seed(99, index)])[0] for index in (0, 2, 1, 0)]
    instructions = [observation["instruction"] for observation in seen]
    assert instructions[0] == instructions[1] == instructions[3] != instructions[2]
    assert instructions[0] == "pick up the milk and place it in the basket"
    for name, part in seen[0].items():
        np.testing.assert_array_equal(part, seen[3][name])
    assert (seen[0]["image"] != seen[1]["image"]).any()  # another initial state
    picture = seen[0]["image"]
    assert picture.shape == seen[0]["wrist_image"].shape == (64, 64, 3)
    assert picture[:8, :20].mean() + 30 < picture[-8:, :20].mean()
    down = np.array([0, 0, -1, 0, 0, 0, -1], dtype=np.float32)
    heights = [env.step([0], [down])[0].observation["state"][2] for _ in range(3)]
    assert heights[0] > heights[1] > heights[2]
    (result,) = env.step([0], [down])
    assert result.info == {
        "task": "pick_up_the_milk_and_place_it_in_the_basket",
        "success_once": 0.0,
        "success_at_end": 0.0,
    }
    np.testing.assert_array_equal(env.render([0])[0], result.observation["image"])
    env.close()


@needs_assets
@pytest.mark.timeout(600)
def test_success_ends_an_episode_with_its_reward() -> None:
    """The milk is put where the task wants it, with the simulator's own means."""
    env = milk(1, image_size=0)
    env.reset([0], [0])
    simulator: Any = env._slots[0].simulator  # type: ignore[union-attr]
    inner = simulator._env.env
    basket = inner.sim.data.get_body_xpos("basket_1_main")
    above = np.array([*basket[:2], basket[2] + 0.1, 1, 0, 0, 0])  # and upright
    inner.sim.data.set_joint_qpos("milk_1_joint0", above)
    inner.sim.forward()
    rest = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)
    for _ in range(60):
        (result,) = env.step([0], [rest])
        if result.terminated:
            break
    assert result.terminated
    assert (result.reward, result.info["success_at_end"]) == (1.0, 1.0)
    with pytest.raises(SimError, match="slot 0 has no episode"):
        env.step([0], [rest])
    env.close()


@needs_package
def test_absent_assets_are_told() -> None:
    """In an interpreter of its own, as the package is configured once in each."""
    code = "from sim.libero import Libero; Libero(1, 'libero_goal', path='/nowhere')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100
    )
    assert "MissingDependency: LIBERO's assets are not in" in done.stderr
    assert "set path in [env.args] to their folder, or libero-download-assets" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "libero_objects"}, "it is one of libero_spatial, libero_object"),
        ({"image_size": -1}, "image_size = -1"),
        ({"settle_steps": -1}, "settle_steps = -1"),
    ],
)
def test_wrong_arguments_say_the_rule(options: dict[str, Any], message: str) -> None:
    """Before the package is loaded."""
    with pytest.raises(ValueError, match=message):
        milk(1, **options)


def test_limits_are_the_published_ones() -> None:
    """Of OpenVLA's evaluation."""
    assert STEP_LIMITS["libero_spatial"] == 220
    assert STEP_LIMITS["libero_10"] == 520


@pytest.mark.skipif(installed, reason="it is installed")
def test_without_the_package_the_command_is_named() -> None:
    """One sentence with the way out."""
    with pytest.raises(MissingDependency, match="needs the module libero: make install-robots"):
        milk(1)
