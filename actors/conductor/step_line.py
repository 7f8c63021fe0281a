"""What the line of metrics of a step says: about its groups, its update, and where its actors' time went. Pure."""

from collections.abc import Callable, Mapping
from typing import Any

from actors.conductor.batches import Batch
from actors.conductor.filtering import can_teach
from channels.work import StepDone


def step_line(
    done: StepDone, batch: Batch, *, run_attempt: int, now: float, seconds: float
) -> dict[str, Any]:
    """Rewards and what the task tells are means over everything that was sampled for the step, also what was filtered
    out: a job that trains only on what it can half solve gets better all the same.

    now: seconds since the epoch    seconds: since the step before
    """
    trained, sampled = list(batch.received.values()), batch.sampled
    rewards = [reward for group in sampled for reward in group.rewards]
    tokens = sum(group.tokens for group in trained)
    lags = [done.step - group.min_version for group in trained]
    mean = sum(rewards) / max(len(rewards), 1)
    variance = sum((reward - mean) ** 2 for reward in rewards) / max(len(rewards), 1)
    useful = sum(can_teach(group.rewards) for group in trained)
    line: dict[str, Any] = {
        "step": done.step,
        "policy_version": done.policy_version,
        "attempt": run_attempt,
        "time": round(now, 3),
        "reward_mean": round(mean, 6),
        "reward_std": round(variance**0.5, 6),
        "staleness_max": max(lags, default=0),
        "staleness_mean": round(sum(lags) / max(len(lags), 1), 4),
        "groups": len(trained),
        "group_ids": sorted(batch.received),
        "groups_sampled": len(sampled),
        "filtered_share": round(len(batch.filtered) / max(len(sampled), 1), 6),
        "useful_share": round(useful / max(len(trained), 1), 6),
        "samples": sum(len(group.rewards) for group in trained),
        "tokens": tokens,
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        "seconds": round(seconds, 4),
    }
    for key in sorted({key for group in sampled for key in group.info}):
        values = [group.info[key] for group in sampled if key in group.info]
        line[f"info_{key}"] = round(sum(values) / len(values), 6)
    line.update(done.metrics)
    if done.weights_variant is not None:
        line["weights_variant"] = done.weights_variant
    return line


class StageSeconds:
    """Turns what actors say of their whole life into seconds by kind since the step before.

    told: what each actor said last, seconds of its life by what it did
    """

    def __init__(self) -> None:
        self.told: dict[str, Mapping[str, float]] = {}
        self._counted: dict[str, Mapping[str, float]] = {}

    def since_last(self, kind_of: Callable[[str], str]) -> dict[str, float]:
        """Summed over the actors of a kind: "rollout_work_s", "env_wait_tickets_s", …"""
        times: dict[str, float] = {}
        for actor, seconds in self.told.items():
            counted = self._counted.get(actor, {})
            for name, value in seconds.items():
                key = f"{kind_of(actor)}_{name}_s"
                before = counted.get(name, 0.0)
                since = value - before if value >= before else value  # restarted: counts anew
                times[key] = round(times.get(key, 0.0) + since, 4)
            self._counted[actor] = seconds
        return times
