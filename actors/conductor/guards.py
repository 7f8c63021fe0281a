"""Guards: what ends a job with a reason rather than letting it waste a night. Pure: metrics in, a sentence out."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from actors.conductor.config import GuardsConfig


class Guards:
    """Fed once per step, in order."""

    def __init__(self, config: GuardsConfig) -> None:
        self._config = config
        self._constant: deque[float] = deque(maxlen=max(config.constant_reward_steps, 1))

    def check(self, metrics: Mapping[str, float], rewards: Sequence[float]) -> str | None:
        """rewards: of every sample of the step. Returns why the job must stop, or None."""
        for name in ("loss", "grad_norm"):
            value = metrics.get(name, 0.0)
            if not math.isfinite(value):
                return (
                    f"{name} is {value}: the update was not committed; lower trainer.learning_rate, "
                    "look at the step's samples, then resume from the last commit"
                )
        kl = metrics.get("kl_sampler", 0.0)
        if self._config.max_kl is not None and not kl <= self._config.max_kl:  # NaN is above too
            return (
                f"sampler-trainer KL {kl:.4g} is above guards.max_kl = {self._config.max_kl}: sampled and "
                "trained policies disagree; lower max_staleness or the learning rate, or check dtype"
            )
        return self._check_constant(rewards)

    def _check_constant(self, rewards: Sequence[float]) -> str | None:
        if not self._config.constant_reward_steps or not rewards:
            return None
        if min(rewards) != max(rewards) or (self._constant and self._constant[-1] != rewards[0]):
            self._constant.clear()
        if min(rewards) == max(rewards):
            self._constant.append(rewards[0])
        if len(self._constant) == self._config.constant_reward_steps:
            return (
                f"every sample of the last {self._config.constant_reward_steps} steps had the reward "
                f"{rewards[0]:g}: there is nothing to learn from; check the task's grading, or set "
                "guards.constant_reward_steps = 0"
            )
        return None
