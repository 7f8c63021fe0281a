"""Action chunks: a policy's several steps at once, run on an environment that takes one step at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.contract import ArrayEnvironment, StepResult


class Chunked:
    """An environment whose actions are chunks: `[chunk, *action_space.shape]`, of any length per slot and call.

    Slots are stepped together, and each drops out at the end of its chunk or its episode: what is left of a chunk
    then is not run. `observation` and `info` are those of the last step that was run.
    """

    def __init__(self, env: ArrayEnvironment) -> None:
        self._env = env
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.counted_seeds: bool = getattr(env, "counted_seeds", False)

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        """Start an episode in each slot."""
        return self._env.reset(slots, seeds)

    def step(self, slots: Sequence[int], actions: Sequence[NDArray[Any]]) -> list[StepResult]:
        """Run one chunk per slot. ValueError: an action is no chunk of the action space; nothing is stepped."""
        shape = self.action_space.shape
        for slot, action in zip(slots, actions, strict=True):
            if action.ndim != len(shape) + 1 or action.shape[1:] != shape or not len(action):
                raise ValueError(
                    f"slot {slot}: an action of shape {list(action.shape)}, where a chunk is "
                    f"[steps, {', '.join(map(str, shape))}]: give at least one step"
                )
        last: dict[int, StepResult] = {}
        rewards: list[list[float]] = [[] for _ in slots]
        going = list(range(len(slots)))  # places in `slots`
        step = 0
        while going:
            results = self._env.step([slots[i] for i in going], [actions[i][step] for i in going])
            for i, result in zip(going, results, strict=True):
                last[i] = result
                rewards[i].append(result.reward)
            step += 1
            going = [
                i
                for i in going
                if not (last[i].terminated or last[i].truncated) and step < len(actions[i])
            ]
        return [
            replace(last[i], reward=sum(of_steps), step_rewards=np.array(of_steps, np.float32))
            for i, of_steps in enumerate(rewards)
        ]

    def render(self, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        """A picture of each slot."""
        return self._env.render(slots)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
