"""Meta-World: fifty manipulation tasks of a Sawyer arm, one at a time. Loads the package when it is opened.

Meta-World's own `reset(seed)` ignores the seed. Here the seed draws the places of objects and goal from the whole of
the task's range, as the benchmark's tasks are drawn, and the goal is part of the observation (MT1).
"""

import difflib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.errors import MissingDependency, SimError
from sim.rendering import choose_mujoco_gl
from sim.slots import Observation, SimulatorSlots
from sim.spaces import ArraySpace

LONGEST = 500  # steps, after which Meta-World wants a reset
CAMERA = "corner2"  # the usual one of pictures of Meta-World


class MetaWorld(SimulatorSlots):
    """Episodes of one task.

    num_slots: episodes hosted at the same time, each in a simulator of its own
    env_name: of the task, such as "drawer-close-v3"
    max_steps: episodes are truncated after so many, 500 at most; nothing else ends them
    camera: of render()
    size: pixels of a side of render()'s pictures

    Observation: "state" float32 [39]: hand, gripper, objects, the same of the step before, goal. Action: float32 [4] in
    [-1, 1]: the hand's move and the gripper's effort. The reward is Meta-World's dense one, 0 to 10 a step.

    MissingDependency: metaworld is not installed. SimError: it has no such task. ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        num_slots: int,
        env_name: str,
        max_steps: int = LONGEST,
        *,
        camera: str = CAMERA,
        size: int = 256,
    ) -> None:
        if not 1 <= max_steps <= LONGEST:
            raise ValueError(f"max_steps = {max_steps}: Meta-World allows 1 to {LONGEST}")
        super().__init__(lambda: _open(env_name, camera, size), num_slots, max_steps=max_steps)


def _open(env_name: str, camera: str, size: int) -> Any:
    choose_mujoco_gl()
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        from sim.gymnasium_simulator import GymnasiumSimulator
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Meta-World needs the module {error.name}: make install-robots, or pip install "
            "'flowd[metaworld]' where env actors run"
        ) from error
    if env_name not in ALL_V3_ENVIRONMENTS:
        near = difflib.get_close_matches(env_name, ALL_V3_ENVIRONMENTS, n=3)
        known = ", ".join(near or ALL_V3_ENVIRONMENTS)
        raise SimError(f'env_name = "{env_name}": Meta-World has no such task; there is {known}')

    class Seeded(GymnasiumSimulator):
        """A task whose random vector (places of objects and goal) is drawn from the seed."""

        def reset(self, seed: int) -> Observation:
            self._env.seed(seed)
            return super().reset(seed)

        def render(self) -> NDArray[np.uint8]:
            picture = super().render()
            return picture[::-1, ::-1].copy() if upside_down else picture

    upside_down = camera.startswith("corner")  # as the models have these cameras
    env = ALL_V3_ENVIRONMENTS[env_name](
        render_mode="rgb_array", camera_name=camera, width=size, height=size
    )
    # What the package's own classes with an observable goal set; they take no camera.
    env._partially_observable = False
    del env.sawyer_observation_space  # cached without the goal
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    env._set_task_called = True
    simulator = Seeded(env)
    simulator.observation_space = {"state": ArraySpace(shape=(39,), dtype="float32")}
    return simulator
