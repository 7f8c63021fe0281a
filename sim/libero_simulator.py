"""One simulator of LIBERO: the task and the initial state that a seed names, one episode at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from libero.libero.envs import OffScreenRenderEnv
from libero.libero.envs.env_wrapper import ControlEnv
from numpy.typing import NDArray

from sim.contract import split_counted_seed
from sim.errors import SimError
from sim.slots import Observation, Outcome
from sim.spaces import ArraySpace, ObservationSpace, TextSpace

CAMERAS = {"image": "agentview_image", "wrist_image": "robot0_eye_in_hand_image"}
REST = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)  # no move, gripper open
# Fixtures are placed at a reset, and not by the initial state: the published states were made with this seed.
FIXTURES_SEED = 0


class LiberoSimulator:
    """See `sim.libero.Libero` for the arguments. suite: the package's object of it."""

    def __init__(
        self,
        suite: Any,
        tasks: Sequence[int],
        *,
        image_size: int,
        settle_steps: int,
        max_steps: int,
    ) -> None:
        self._suite = suite
        self._tasks = tasks
        self._image_size = image_size
        self._settle_steps = settle_steps
        self._horizon = (
            max_steps + settle_steps + 1
        )  # the simulator's own, which is never to be reached
        self._task: int | None = None
        self._env: Any = None
        self._picture: NDArray[np.uint8] | None = None
        self._open(tasks[0])
        observation = self.reset(0)
        space: dict[str, ArraySpace | TextSpace] = {}
        for name, part in observation.items():
            if isinstance(part, str):
                space[name] = TextSpace()
            elif part.dtype == np.uint8:
                space[name] = ArraySpace(shape=part.shape, dtype="uint8", low=0, high=255)
            else:
                space[name] = ArraySpace(shape=part.shape, dtype="float32")
        self.observation_space: ObservationSpace = space
        self.action_space = ArraySpace(shape=(7,), dtype="float32", low=-1.0, high=1.0)

    def reset(self, seed: int) -> Observation:
        """Start the episode of the seed's index: task by task, then the next initial state of each."""
        _, index = split_counted_seed(seed)
        trial, place = divmod(index, len(self._tasks))
        self._open(self._tasks[place])
        self._env.seed(FIXTURES_SEED)
        self._env.reset()
        self._env.set_init_state(self._states[trial % len(self._states)])
        for _ in range(self._settle_steps):
            self._env.env.done = (
                False  # an initial state may count as a success while things still fall
            )
            self._env.step(REST)
        return self._named(self._env.env._get_observations())

    def step(self, action: NDArray[Any]) -> Outcome:
        """Take one step."""
        self._env.env.done = False  # the slot decides what ends an episode
        observation, reward, success, _ = self._env.step(np.asarray(action, dtype=np.float64))
        return Outcome(
            observation=self._named(observation),
            reward=float(reward),
            terminated=bool(success),
            success=bool(success),
            info={"task": self._name},
        )

    def render(self) -> NDArray[np.uint8]:
        """The front camera's picture. SimError: it was made without."""
        if self._picture is None:
            raise SimError("image_size = 0 renders nothing: set it in [env.args]")
        return self._picture.copy()

    def close(self) -> None:
        """Free the simulator."""
        if self._env is not None:
            self._env.close()
            self._env = None

    def _open(self, task: int) -> None:
        if task == self._task:
            return
        self.close()
        described = self._suite.get_task(task)
        options: dict[str, Any] = {
            "bddl_file_name": self._suite.get_task_bddl_file_path(task),
            "horizon": self._horizon,
        }
        if self._image_size:
            self._env = OffScreenRenderEnv(
                camera_heights=self._image_size, camera_widths=self._image_size, **options
            )
        else:
            self._env = ControlEnv(has_offscreen_renderer=False, use_camera_obs=False, **options)
        self._states = self._suite.get_task_init_states(task)
        self._task, self._name, self._instruction = task, described.name, described.language

    def _named(self, seen: Any) -> Observation:
        named: Observation = {
            "state": np.concatenate(
                [
                    seen["robot0_eef_pos"],
                    _axis_angle(seen["robot0_eef_quat"]),
                    seen["robot0_gripper_qpos"],
                ]
            ).astype(np.float32),
            "instruction": self._instruction,
        }
        if self._image_size:
            named |= {name: seen[key][::-1, ::-1].copy() for name, key in CAMERAS.items()}
            self._picture = named["image"]
        else:
            named["objects"] = np.array(seen["object-state"], dtype=np.float32)
        return named


def _axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64 [3], the axis times the angle in radians. quaternion: x, y, z, w."""
    w = np.clip(quaternion[3], -1.0, 1.0)
    length = np.sqrt(1.0 - w * w)
    if length < 1e-9:
        return np.zeros(3)
    return np.asarray(quaternion[:3] * 2.0 * np.arccos(w) / length)
