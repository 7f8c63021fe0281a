"""What a stream of updates tells about a job. Plain data: shows nothing, asks nobody."""

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowd.console import stage_times

USUAL_ACTOR_STATES = frozenset({"ready", "running", "parked"})
WINDOW_S = 5.0  # one short step says little about where time goes
STAGE_KEY = re.compile(r"(env|rollout|inference|trainer)_(setup|work|wait_\w+)_s")
Update = dict[str, Any]


def update_of(kind: str, data: Mapping[str, Any]) -> Update:
    """An event of a job as the update that followers get."""
    if kind == "step":
        return {"event": "step", "metrics": dict(data)}
    return {**data, "event": kind}


@dataclass
class Watched:
    """What is known of the job; `apply` takes the updates in, in order.

    step: trainer steps done; a step's own number, in its metrics and samples, counts from 0
    """

    name: str
    state: str = ""
    step: int = 0
    steps: int = 0
    reason: str = ""
    error: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    actors: dict[str, dict[str, Any]] = field(default_factory=dict)
    recent: deque[dict[str, Any]] = field(default_factory=deque)

    def apply(self, update: Update) -> None:
        """Take one update in. Events of unknown kinds change nothing."""
        match update["event"]:
            case "status":
                status = update["status"]
                self._take_state(status)
                self.step, self.steps = status.get("step") or 0, status.get("steps") or 0
                self.actors = {actor["name"]: actor for actor in status.get("actors", [])}
                if not self.metrics:
                    self.metrics = dict(status)
            case "step":
                self.metrics = update["metrics"]
                self.step = self.metrics.get("policy_version", self.metrics["step"])
                self.recent.append(self.metrics)
                while sum(m.get("seconds") or 0.0 for m in self.recent) > WINDOW_S:
                    if len(self.recent) == 1:
                        break
                    self.recent.popleft()
            case "eval":
                self.evaluation = update
            case "actor":
                self.actors[update["name"]] = update
            case "job":
                self._take_state(update)

    def recent_times(self) -> dict[str, str]:
        """How each stage's time divided over the last steps; before them, since its actors' start."""
        if not self.recent:
            return stage_times(self.actors.values())
        return stage_times(stage for metrics in self.recent for stage in stages_of(metrics))

    def unusual_actors(self) -> dict[str, str]:
        """Name and state of actors that are neither at work nor waiting for it."""
        return {
            name: str(actor.get("state"))
            for name, actor in self.actors.items()
            if actor.get("state") not in USUAL_ACTOR_STATES
        }

    def status(self) -> dict[str, Any]:
        """The part of a job's status that says how it ended."""
        return {
            "name": self.name,
            "state": self.state,
            "step": self.step,
            "steps": self.steps,
            "reason": self.reason,
            "error": self.error,
        }

    def _take_state(self, said: Mapping[str, Any]) -> None:
        self.state = said["state"]
        self.reason = said.get("reason") or self.reason
        self.error = said.get("error") or self.error


def stages_of(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A step's time per stage, in the form of actors' times.

    The conductor sums "rollout_work_s", "env_wait_tickets_s" and the like over the actors of a
    stage. The trainer's part is told by the step itself: what its step did not take, it waited.
    """
    times: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if value is not None and (match := STAGE_KEY.fullmatch(key)):
            times.setdefault(match[1], {})[match[2]] = float(value)
    seconds, busy = metrics.get("seconds"), metrics.get("seconds_step")
    if "trainer" not in times and seconds is not None and busy is not None:
        times["trainer"] = {"work": busy, "wait_groups": max(seconds - busy, 0.0)}
    return [{"kind": kind, "time": seconds} for kind, seconds in times.items()]


def tokens_per_s(metrics: Mapping[str, Any]) -> float | None:
    """The reported rate, or the step's tokens over its seconds."""
    if metrics.get("tokens_per_s") is not None:
        return float(metrics["tokens_per_s"])
    if metrics.get("tokens") is not None and metrics.get("seconds"):
        return float(metrics["tokens"]) / float(metrics["seconds"])
    return None
