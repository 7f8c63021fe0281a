"""The curve of a run, what it reached when, and the mean of several."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from bench.algorithm_runs import Record

GOAL = 0.9
WINDOW = 5  # steps that a reward is averaged over, as `stop_reward` does
Found = Mapping[str, Sequence[Record]]  # by label, a record per seed


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's reward (mean of the last WINDOW steps), over groups sampled and over seconds since its first step."""

    groups: list[float]
    seconds: list[float]
    rewards: list[float]


def curve(record: Record) -> Curve:
    """Warm-up and start are left out of the seconds: they are the same for all."""
    steps = record.steps
    began = steps[0]["time"] - steps[0]["seconds"]
    groups, total = [], 0.0
    for step in steps:
        total += step.get("groups_sampled", step["groups"])
        groups.append(total)
    raw = [step["reward_mean"] for step in steps]
    return Curve(
        groups=groups,
        seconds=[step["time"] - began for step in steps],
        rewards=[statistics.fmean(raw[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(raw))],
    )


def reaches(found: Curve, goal: float = GOAL) -> int | None:
    """The first step whose window is whole and has the goal."""
    for place in range(WINDOW - 1, len(found.rewards)):
        if found.rewards[place] >= goal:
            return place
    return None


def summary(record: Record) -> dict[str, float | None]:
    """A row of the table for one run."""
    drawn = curve(record)
    place = reaches(drawn)
    return {
        "reward": drawn.rewards[-1],
        "groups_to_goal": None if place is None else drawn.groups[place],
        "seconds_to_goal": None if place is None else drawn.seconds[place],
        "tokens_per_s": sum(step["tokens"] for step in record.steps) / drawn.seconds[-1],
    }


def mean_curve(
    xs: Sequence[Sequence[float]], ys: Sequence[Sequence[float]], points: int = 200
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Mean, lowest and highest of several curves over a common axis; one that has ended keeps its last value."""
    end = max(x[-1] for x in xs)
    grid = [end * i / (points - 1) for i in range(points)]
    rows = [[_at(x, y, place) for x, y in zip(xs, ys, strict=True)] for place in grid]
    return grid, [statistics.fmean(r) for r in rows], [min(r) for r in rows], [max(r) for r in rows]


def _at(xs: Sequence[float], ys: Sequence[float], place: float) -> float:
    if place <= xs[0]:
        return ys[0]
    for (x0, y0), (x1, y1) in pairwise(zip(xs, ys, strict=True)):
        if place <= x1:
            return y0 + (y1 - y0) * (place - x0) / (x1 - x0) if x1 > x0 else y1
    return ys[-1]
