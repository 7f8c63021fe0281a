"""A simulator that only measures and a policy that does nothing: how long an observation is on its way to an action."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.contract import StepResult
from sim.spaces import ArraySpace

WARM_IN_STEPS = 100


class Echo:
    """Episodes of `max_steps` steps that take no time. What passes between the return of a step and the next call is
    what env actor and rollout actor do; its quantiles are in the info of the last step, in microseconds.

    num_slots: 1, so that nothing else is waited for    size_bytes: of an observation
    """

    def __init__(self, num_slots: int, size_bytes: int = 50_000, max_steps: int = 1100) -> None:
        if num_slots != 1:
            raise ValueError(
                f"num_slots = {num_slots}: the latency of one episode is measured; give 1"
            )
        self.observation_space = {"state": ArraySpace(shape=(size_bytes // 4,), dtype="float32")}
        self.action_space = ArraySpace(shape=(7,), dtype="float32", low=-1.0, high=1.0)
        self._max_steps = max_steps
        self._returned = 0.0
        self._waits: list[float] = []

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Begin to count."""
        self._waits = []
        self._returned = time.perf_counter()
        return [self._observation()]

    def step(self, slots: Sequence[int], actions: Sequence[NDArray[Any]]) -> list[StepResult]:
        """Note how long the action was on its way."""
        self._waits.append(time.perf_counter() - self._returned)
        last = len(self._waits) == self._max_steps
        waits = self._waits[WARM_IN_STEPS:]
        info = {}
        if last:
            ranked = statistics.quantiles(waits, n=100)
            info = {f"latency_us_p{p}": 1e6 * ranked[p - 1] for p in (50, 90, 99)}
        result = StepResult(
            observation=self._observation(), reward=0.0, terminated=False, truncated=last, info=info
        )
        self._returned = time.perf_counter()
        return [result]

    def _observation(self) -> dict[str, Any]:
        return {"state": np.zeros(self.observation_space["state"].shape, dtype=np.float32)}

    def render(self, slots: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Black."""
        return [np.zeros((16, 16, 3), dtype=np.uint8) for _ in slots]

    def close(self) -> None:
        """Nothing to free."""


def still(config: Any) -> Any:
    """A policy whose every action is zero."""
    import torch

    from actors.models.action_policy import Acted, ActionPolicy

    class Still(ActionPolicy):
        chunk, units_per_step, draws, returns = 1, 1, 1, None

        def act(self, observations: Mapping[str, Any], uniforms: Any, *, greedy: bool) -> Acted:
            batch = len(observations["state"])
            return Acted(
                actions=torch.zeros(batch, 1, config.action),
                logprobs=torch.zeros(batch, 1),
                values=torch.zeros(batch),
            )

    return Still()
