"""What a stream of updates tells about a job. Plain data: shows nothing, asks nobody."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flowd.console import stage_times

USUAL_ACTOR_STATES = frozenset({"ready", "running", "parked"})
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
    actors: dict[str, dict[str, Any]] = field(default_factory=dict)
    _earlier: dict[str, dict[str, float]] = field(default_factory=dict)

    def apply(self, update: Update) -> None:
        """Take one update in. Events of unknown kinds change nothing."""
        match update["event"]:
            case "status":
                status = update["status"]
                self._take_state(status)
                self.step, self.steps = status.get("step") or 0, status.get("steps") or 0
                self.actors = {a["name"]: self._timed(a) for a in status.get("actors", [])}
                if not self.metrics:
                    self.metrics = dict(status)
            case "step":
                self.metrics = update["metrics"]
                self.step = self.metrics.get("policy_version", self.metrics["step"])
            case "actor" if update.get("state") == "gone":
                self.actors[update["name"]] = dict(update)
                self._earlier.pop(update["name"], None)
            case "actor":
                self.actors[update["name"]] = self._timed(update)
            case "job":
                self._take_state(update)

    def recent_times(self) -> dict[str, str]:
        """How each stage's time divided between its actors' last two reports."""
        recent = []
        for name, actor in self.actors.items():
            times = actor.get("time") or {}
            earlier = self._earlier.get(name, {})
            since = {key: seconds - earlier.get(key, 0.0) for key, seconds in times.items()}
            restarted = any(seconds < 0 for seconds in since.values())
            recent.append({**actor, "time": times if restarted else since})
        return stage_times(recent)

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

    def _timed(self, actor: Mapping[str, Any]) -> dict[str, Any]:
        times = (self.actors.get(actor["name"]) or {}).get("time")
        if times and actor.get("time") and times != actor["time"]:
            self._earlier[actor["name"]] = times
        return dict(actor)


def tokens_per_s(metrics: Mapping[str, Any]) -> float | None:
    """The reported rate, or the step's tokens over its seconds."""
    if metrics.get("tokens_per_s") is not None:
        return float(metrics["tokens_per_s"])
    if metrics.get("tokens") is not None and metrics.get("seconds"):
        return float(metrics["tokens"]) / float(metrics["seconds"])
    return None
