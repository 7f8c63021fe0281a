"""Guards: what ends a job with a reason rather than letting it waste a night. Pure: metrics in, a sentence out."""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from actors.conductor.config import GuardsConfig
from channels.work import InCall

NAMED = 3  # actors in a sentence


def no_progress(limit_s: float, calls: Mapping[str, InCall | None]) -> str:
    """Why a job without a step for so long was ended, and where it hangs.

    calls: by actor the blocking call that it is in; None for one that did not answer
    """
    hung = sorted(
        # What began in this time's second half may come to its end still.
        (
            (call.seconds, actor, call.call)
            for actor, call in calls.items()
            if call is not None and call.call and call.seconds >= limit_s / 2
        ),
        reverse=True,
    )
    said = [
        f"{actor} has been in one blocking call for {seconds:.0f} s ({call})"
        for seconds, actor, call in hung
    ]
    said += [f"{actor} does not answer" for actor, call in calls.items() if call is None]
    if len(said) > NAMED:
        said[NAMED:] = [f"and {len(said) - NAMED} more"]
    where = "; ".join(said) or "no actor hangs in a call"
    return (
        f"no trainer step for {limit_s:g} s (guards.no_progress_s): {where}; "
        "`flowctl status` says what each actor waits for"
    )


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
