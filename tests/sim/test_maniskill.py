"""ManiSkill3 through the contract; where it, its driver or its assets are not there, what is said."""

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.checker import check
from sim.errors import MissingDependency, SimError
from sim.maniskill import ManiSkill

# The packages warn of what NumPy and Gymnasium will change.
pytestmark = pytest.mark.filterwarnings("default")
ASSETS = Path(__file__).parents[2] / "../shared/data/maniskill"
installed = importlib.util.find_spec("mani_skill") is not None
needs_maniskill = pytest.mark.skipif(
    not installed, reason="ManiSkill is not installed: make install-robots, make test-robots"
)
push = partial(ManiSkill, env_id="PushCube-v1")


@needs_maniskill
@pytest.mark.parametrize("env_id", ["PushCube-v1", "PickCube-v1", "StackCube-v1"])
def test_states_keep_the_contract(env_id: str) -> None:
    """Bit for bit, several scenes in a process."""
    make = partial(ManiSkill, env_id=env_id)
    checked = check(
        partial(make, max_steps=8), uncut=partial(make, max_steps=10), seeds=(0, 2**62 + 5)
    )
    assert checked.ended == checked.episodes


@needs_maniskill
def test_pictures_and_states_keep_the_contract() -> None:
    """The robot's own state beside the camera; a picture of a scene for videos."""
    make = partial(push, obs_mode="rgb", image_size=32, render=True)
    env = make(1)
    (observation,) = env.reset([0], [1])
    assert {name: (part.shape, part.dtype) for name, part in observation.items()} == {
        "state": ((25,), np.float32),
        "image": ((32, 32, 3), np.uint8),
    }
    assert observation["image"].std() > 10
    (picture,) = env.render([0])
    assert picture.std() > 10
    env.close()
    check(partial(make, max_steps=2), seeds=(0, 1))


@needs_maniskill
def test_rewards_are_as_asked() -> None:
    """Dense ones are normalised to 1 a step; sparse ones are 0 before success; both successes are said."""
    rewards = {}
    for mode in ("normalized_dense", "dense", "sparse", "none"):
        env = push(1, reward_mode=mode)
        env.reset([0], [1])
        (result,) = env.step([0], [np.zeros(8, dtype=np.float32)])
        assert (result.info["success_once"], result.info["success_at_end"]) == (0.0, 0.0)
        rewards[mode] = result.reward
        env.close()
    assert 0 < rewards["normalized_dense"] < rewards["dense"]
    assert (rewards["sparse"], rewards["none"]) == (0.0, 0.0)


@needs_maniskill
def test_a_robot_with_another_control_pushes_the_cube() -> None:
    """A hand-written policy in ee-delta control succeeds; the registered limit cuts the episode."""
    env = push(1, control_mode="pd_ee_delta_pos", ignore_terminations=True)
    (observation,) = env.reset([0], [3])
    assert env.action_space.shape == (4,)
    for step in range(50):
        state = observation["state"]
        # qpos 9, qvel 9, hand pose 7, goal 3, cube pose 7
        hand, goal, cube = state[18:21], state[25:28], state[28:31]
        behind = cube + np.array([-0.08, 0.0, 0.0])
        target = behind if step < 20 else np.array([goal[0], cube[1], 0.02])
        move = np.append(np.clip((target - hand) * 8, -1, 1), -1.0).astype(np.float32)
        (result,) = env.step([0], [move])
        observation = result.observation
        assert result.truncated == (step == 49)
    assert result.info["success_once"] == 1.0
    env.close()


@needs_maniskill
@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"{ASSETS} is not there")
def test_the_carrot_is_put_on_a_plate_from_a_data_folder() -> None:
    """Another interpreter, as the folder is read once in each; success as the reward, the instruction, the photo."""
    code = f"""
import numpy as np
from sim.checker import check
from sim.maniskill import ManiSkill
make = lambda num_slots, **o: ManiSkill(
    num_slots, "PutCarrotOnPlateInScene-v1", obs_mode="rgb", reward_mode="sparse", path={str(ASSETS)!r}, **o
)
env = make(1)
(observation,) = env.reset([0], [1])
assert observation["instruction"] == "put carrot on plate"
assert observation["image"].shape == (480, 640, 3) and observation["image"].std() > 30
(result,) = env.step([0], [np.zeros(7, dtype=np.float32)])
assert result.reward == 0.0 and result.info["is_src_obj_grasped"] == 0.0
env.close()
print(check(lambda num_slots: make(num_slots, max_steps=2), seeds=(0, 1)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_maniskill
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"env_id": "PushCub-v1"}, SimError, r"no such task; there is PushCube-v1"),
        (
            {"env_id": "PutCarrotOnPlateInScene-v1"},
            MissingDependency,
            r"bridge_v2_real2sim.*set path",
        ),
        (
            {"sim_backend": "gpu"},
            MissingDependency,
            r"physics library .*libPhysXGpu_64.so is not there",
        ),
        (
            {"env_id": "StackPyramid-v1", "reward_mode": "dense"},
            SimError,
            '"sparse" is always possible',
        ),
    ],
)
def test_what_is_not_there_is_told(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A task, assets, the GPU's physics library, a reward."""
    with pytest.raises(error, match=message):
        ManiSkill(1, **{"env_id": "PushCube-v1", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_mode": "rgbd"}, '"rgbd": it is one of state, rgb'),
        ({"reward_mode": "danse"}, "it is one of normalized_dense"),
        ({"image_size": 0}, "image_size = 0"),
    ],
)
def test_wrong_arguments_say_the_rule(options: dict[str, Any], message: str) -> None:
    """Before the package is loaded."""
    with pytest.raises(ValueError, match=message):
        push(1, **options)


@pytest.mark.skipif(installed, reason="it is installed")
def test_without_the_package_the_command_is_named() -> None:
    """One sentence with the way out."""
    with pytest.raises(MissingDependency, match="needs the module mani_skill: make install-robots"):
        push(1)
