"""A point that reaches a goal on a table: the smallest robot there is, for tests and first tries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.contract import StepResult
from sim.errors import SimError
from sim.spaces import ArraySpace, ObservationSpace

SPEED = 0.1  # of a step, in half widths of the table
REACH = 0.1  # distance to the goal that is a success
RENDER_SIZE = 64  # pixels
BACKGROUND, GOAL, POINT = (235, 235, 235), (60, 160, 75), (215, 60, 50)

_NOT_YET = {"success_once": 0.0, "success_at_end": 0.0}
_LEFT = {"success_once": 1.0, "success_at_end": 0.0}
_THERE = {"success_once": 1.0, "success_at_end": 1.0}
_SUCCESS = (_NOT_YET, _LEFT, _THERE)  # by successes counted so: once + now


class PointReach:
    """Move a point to a goal; both start anywhere on the square table [-1, 1]².

    num_slots: episodes hosted at the same time; all are computed as one array
    max_steps: the episode is truncated after so many
    reward: "dense" is minus the distance to the goal after the step; "sparse" is 1 while the point is there, else 0
    ignore_terminations: reaching the goal does not end the episode, so that every one has max_steps
    image_size: > 0 adds "image", uint8 [image_size, image_size, 3], and leaves the goal out of "state"

    Observation: "state" float32 [4], point and goal (x, y each); [2] beside an image. Action: float32 [2] in [-1, 1],
    the share of the highest speed along x and y. Success: within 0.1 of the goal.

    ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        num_slots: int,
        max_steps: int = 50,
        *,
        reward: str = "dense",
        ignore_terminations: bool = False,
        image_size: int = 0,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps = {max_steps}: allow at least 1")
        if reward not in ("dense", "sparse"):
            raise ValueError(f'reward = "{reward}": it is "dense" or "sparse"')
        if image_size < 0:
            raise ValueError(
                f"image_size = {image_size}: the rule is image_size >= 0; 0 is no image"
            )
        self._max_steps = max_steps
        self._sparse = reward == "sparse"
        self._ends = not ignore_terminations
        self._image_size = image_size
        self._places = np.zeros((num_slots, 4), dtype=np.float32)  # point and goal, x and y
        self._steps = np.zeros(num_slots, dtype=np.int64)
        self._successes = np.zeros(num_slots, dtype=np.int64)  # 1 once there was one
        self._running = np.zeros(num_slots, dtype=np.bool_)
        space: dict[str, ArraySpace] = {
            "state": ArraySpace(
                shape=(2 if image_size else 4,), dtype="float32", low=-1.0, high=1.0
            )
        }
        if image_size:
            shape = (image_size, image_size, 3)
            space["image"] = ArraySpace(shape=shape, dtype="uint8", low=0, high=255)
        self.observation_space: ObservationSpace = space
        self.action_space = ArraySpace(shape=(2,), dtype="float32", low=-1.0, high=1.0)

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Put point and goal where the seed says."""
        for slot, seed in zip(slots, seeds, strict=True):
            self._places[slot] = np.random.default_rng(seed).uniform(-1.0, 1.0, 4)
        index = np.asarray(slots, dtype=np.intp)
        self._steps[index] = self._successes[index] = 0
        self._running[index] = True
        return self._observe(self._places[index])

    def step(self, slots: Sequence[int], actions: Sequence[NDArray[Any]]) -> list[StepResult]:
        """Move each point. SimError: a slot has no episode; nothing is moved."""
        index = np.asarray(slots, dtype=np.intp)
        running = self._running[index]
        if not running.all():
            slot = slots[int(np.argmin(running))]
            raise SimError(f"slot {slot} has no episode (ended or never begun): reset it first")
        places = self._places[index]
        moves = np.clip(np.asarray(actions, dtype=np.float32), -1.0, 1.0) * np.float32(SPEED)
        places[:, :2] = np.clip(places[:, :2] + moves, -1.0, 1.0)
        self._places[index] = places
        distances = np.hypot(places[:, 0] - places[:, 2], places[:, 1] - places[:, 3])
        success = distances <= REACH
        self._steps[index] += 1
        self._successes[index] |= success
        terminated = success & self._ends
        truncated = ~terminated & (self._steps[index] >= self._max_steps)
        self._running[index] = ~(terminated | truncated)
        rewards = success.astype(np.float32) if self._sparse else -distances
        return [
            StepResult(
                observation=observation,
                reward=reward,
                terminated=ended,
                truncated=cut,
                info=dict(_SUCCESS[successes]),
            )
            for observation, reward, ended, cut, successes in zip(
                self._observe(places),
                rewards.tolist(),
                terminated.tolist(),
                truncated.tolist(),
                (self._successes[index] + success).tolist(),
                strict=True,
            )
        ]

    def render(self, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        """The table seen from above, x to the right and y upwards: uint8 [64, 64, 3]."""
        return list(_draw(self._places[np.asarray(slots, dtype=np.intp)], RENDER_SIZE))

    def close(self) -> None:
        """Nothing to free."""

    def _observe(self, places: NDArray[np.float32]) -> list[dict[str, Any]]:
        """places: [n, 4], a fresh array. The parts are rows of fresh arrays, which nobody changes later."""
        if not self._image_size:
            return [{"state": row} for row in places]
        images = _draw(places, self._image_size)
        return [
            {"state": row[:2], "image": image} for row, image in zip(places, images, strict=True)
        ]


def _draw(places: NDArray[np.float32], size: int) -> NDArray[np.uint8]:
    """places: [n, 4]. Returns uint8 [n, size, size, 3]: a green disc for the goal, and a red one for the point."""
    line = (2.0 * np.arange(size, dtype=np.float32) + 1.0) / size - 1.0  # the pixels' middles
    images = np.empty((len(places), size, size, 3), dtype=np.uint8)
    images[...] = BACKGROUND
    for columns, colour in (((2, 3), GOAL), ((0, 1), POINT)):
        x, y = (places[:, column, None, None] for column in columns)
        inside = (line[None, None, :] - x) ** 2 + (-line[None, :, None] - y) ** 2 <= REACH**2
        images[inside] = colour
    return images
