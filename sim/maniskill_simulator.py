"""One scene of ManiSkill as a simulator of one episode at a time: batches of one, tensors to arrays."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv
from mani_skill.utils.registration import REGISTERED_ENVS
from numpy.typing import NDArray

from sim.errors import SimError
from sim.slots import Observation, Outcome
from sim.spaces import ArraySpace, Space, TextSpace

SEEDS = 2**32  # of NumPy's old random state, which ManiSkill seeds


class ManiSkillSimulator:
    """See `sim.maniskill.ManiSkill` for the arguments. options: of gymnasium.make."""

    def __init__(
        self,
        env_id: str,
        obs_mode: str,
        reward_mode: str,
        *,
        image_size: int | None,
        render: bool,
        options: Mapping[str, Any],
    ) -> None:
        task = REGISTERED_ENVS[env_id].cls
        if obs_mode == "rgb" and issubclass(task, BaseDigitalTwinEnv):
            obs_mode = "rgb+segmentation"  # these tasks lay a photo over what is not segmented out
        supported = task.SUPPORTED_REWARD_MODES
        # Success is a reward that every task can give.
        self._reward_is_success = reward_mode == "sparse" and "sparse" not in supported
        if self._reward_is_success:
            reward_mode = "none"
        if reward_mode not in supported:
            raise SimError(
                f'reward_mode = "{reward_mode}": {env_id} has {", ".join(supported)}; "sparse" is always possible'
            )
        size = {} if image_size is None else {"width": image_size, "height": image_size}
        made: Any = gymnasium.make(
            env_id,
            num_envs=1,
            obs_mode=obs_mode,
            reward_mode=reward_mode,
            render_mode="rgb_array" if render else None,
            sensor_configs=size,
            disable_env_checker=True,
            **options,
        )
        # Without the step limit that wraps it: slots have their own.
        self._env = made.unwrapped
        self._renders = render
        observation = self.reset(0)
        self.observation_space = {name: _space(part) for name, part in observation.items()}
        action = self._env.single_action_space
        self.action_space = ArraySpace(
            shape=tuple(action.shape), dtype=str(action.dtype), low=action.low, high=action.high
        )

    def reset(self, seed: int) -> Observation:
        """Start an episode."""
        observation, _ = self._env.reset(seed=seed % SEEDS)
        return self._named(observation)

    def step(self, action: NDArray[Any]) -> Outcome:
        """Take one step."""
        observation, reward, terminated, _, info = self._env.step(
            torch.from_numpy(np.asarray(action, dtype=np.float32)[None])
        )
        success = bool(info["success"]) if "success" in info else None
        numbers = {key: _number(value) for key, value in info.items() if key != "success"}
        return Outcome(
            observation=self._named(observation),
            reward=float(success or 0.0) if self._reward_is_success else float(reward),
            terminated=bool(terminated),
            success=success,
            info={key: value for key, value in numbers.items() if value is not None},
        )

    def render(self) -> NDArray[np.uint8]:
        """A picture. SimError: it was made without."""
        if not self._renders:
            raise SimError("this scene was made without pictures: set render = true in [env.args]")
        picture = self._env.render_rgb_array()[0].cpu().numpy()
        return np.array(picture, dtype=np.uint8)

    def close(self) -> None:
        """Free the scene."""
        self._env.close()

    def _named(self, observation: Any) -> Observation:
        if isinstance(observation, torch.Tensor):
            named: Observation = {"state": _array(observation)}
        else:
            own = [observation[part] for part in ("agent", "extra") if part in observation]
            named = {
                "state": np.concatenate([_array(leaf) for part in own for leaf in _leaves(part)])
            }
            for number, (camera, seen) in enumerate(observation["sensor_data"].items()):
                picture = seen["rgb"][0].cpu().numpy()
                named["image" if number == 0 else f"{camera}_image"] = np.array(picture, np.uint8)
        if hasattr(self._env, "get_language_instruction"):
            named["instruction"] = str(self._env.get_language_instruction()[0])
        return named


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, Mapping):
        return [leaf for part in tree.values() for leaf in _leaves(part)]
    return [tree]


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    """float32 [n], of the only scene of a batch."""
    return np.array(tensor[0].flatten().cpu().numpy(), dtype=np.float32)


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and torch.isfinite(value).all():
        return float(value)
    return float(value) if isinstance(value, bool | int | float) else None


def _space(part: Any) -> Space:
    if isinstance(part, str):
        return TextSpace()
    if part.dtype == np.uint8:
        return ArraySpace(shape=part.shape, dtype="uint8", low=0, high=255)
    return ArraySpace(shape=part.shape, dtype=str(part.dtype))
