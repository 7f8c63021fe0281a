"""What sets each algorithm apart, as a number of its own run and of another."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from bench.algorithm_figures import Found, summary
from bench.algorithm_runs import NOISE_BATCHES, Record


def mean_of(key: str, first: float = 0.0, last: float = 1.0) -> Callable[[Record], float]:
    """A metric's mean over a part of the run's steps, from 0 to 1."""

    def measure(record: Record) -> float:
        steps = record.steps
        part = steps[int(first * len(steps)) : max(1, round(last * len(steps)))]
        return statistics.fmean(step[key] for step in part)

    return measure


def growth(key: str) -> Callable[[Record], float]:
    """A metric in the last tenth of the run over that in its first."""
    return lambda record: mean_of(key, 0.9)(record) / mean_of(key, 0.0, 0.1)(record)


def samples_to_goal(record: Record) -> float | None:
    """Groups of different sizes compare in samples."""
    groups = summary(record)["groups_to_goal"]
    return None if groups is None else groups * record.group_size


def explained(first: float, last: float) -> Callable[[Record], float]:
    """The share of the variance of rewards of 0 and 1 that the critic explains, 1 - E(V - R)²/Var R, from the value
    loss, which is half of the squared error."""

    def measure(record: Record) -> float:
        steps = record.steps
        part = steps[int(first * len(steps)) : max(1, round(last * len(steps)))]
        unexplained = statistics.fmean(2 * step["value_loss"] for step in part)
        return 1 - unexplained / statistics.fmean(
            step["reward_mean"] * (1 - step["reward_mean"]) for step in part
        )

    return measure


def rollout_idle(record: Record) -> float:
    """The share of rollout actors' time in which nothing was there to sample."""
    waited = sum(step.get("rollout_wait_requests_s", 0.0) for step in record.steps)
    worked = sum(step.get("rollout_work_s", 0.0) for step in record.steps)
    return waited / (waited + worked)


def noise_scale(small: Record, large: Record) -> float | None:
    """tr Cov(g) / |E g|², in groups: how many it takes until a gradient is as much signal as noise.

    By the unbiased estimates from the norms of gradients of two batch sizes (McCandlish et al. 2018,
    https://arxiv.org/abs/1812.06162, appendix A.1), at one and the same policy. None where the signal is lost.
    """
    (few, first), (many, second) = (
        (
            statistics.fmean(step["groups"] for step in record.steps),
            statistics.fmean(step["grad_norm"] ** 2 for step in record.steps),
        )
        for record in (small, large)
    )
    signal = (many * second - few * first) / (many - few)
    noise = (first - second) / (1 / few - 1 / many)
    return noise / signal if signal > 0 else None


@dataclasses.dataclass(frozen=True)
class Contrast:
    """What sets an algorithm apart, as one number and that of another run.

    ours, other: labels; `measure` is given the records of one label and seed
    other_measure: where the other number is of the same run, or measured otherwise
    """

    algorithm: str
    claim: str
    number: str
    ours: str
    against: str
    other: str
    measure: Callable[[Record], float | None]
    other_measure: Callable[[Record], float | None] | None = None

    def values(self, found: Found) -> tuple[float | None, float | None]:
        """Means over the seeds; None where no run has the number."""
        return _mean(found.get(self.ours, ()), self.measure), _mean(
            found.get(self.other, ()), self.other_measure or self.measure
        )


@dataclasses.dataclass(frozen=True)
class NoiseContrast:
    """The gradient noise of an algorithm against another's, both at the warmed-up policy and on the same samples.

    ours, other: labels without the batch size
    """

    algorithm: str
    claim: str
    ours: str
    against: str
    other: str
    number: str = "gradient noise scale of the warmed-up policy, rewards lowered by 1; in groups"

    def values(self, found: Found) -> tuple[float | None, float | None]:
        """None where a run is missing."""
        return _noise(found, self.ours), _noise(found, self.other)


CONTRASTS: tuple[Contrast | NoiseContrast, ...] = (
    NoiseContrast(
        "grpo",
        "the mean of the group makes up for where the zero of rewards lies",
        "grpo/frozen",
        "no baseline",
        "reinforce_pp/frozen-no-baseline",
    ),
    Contrast(
        "dr_grpo",
        "no division by the deviation: groups that are nearly solved do not count more",
        "gradient norm, last tenth of the run over its first",
        "dr_grpo",
        "grpo",
        "grpo",
        growth("grad_norm"),
    ),
    Contrast(
        "dapo",
        "dynamic sampling keeps the batch full of groups that teach",
        "`useful_share`, second half of the run",
        "dapo",
        "grpo",
        "grpo",
        mean_of("useful_share", 0.5),
    ),
    Contrast(
        "dapo",
        "clip-higher keeps entropy (8 updates a step, no dynamic sampling)",
        "`entropy`, second half of 60 steps",
        "dapo/clip-higher",
        "`clip_high = 0.2`",
        "dapo/clip-symmetric",
        mean_of("entropy", 0.5),
    ),
    NoiseContrast(
        "rloo",
        "the mean of the other answers does too, and leaves the gradient unbiased",
        "rloo/frozen",
        "no baseline",
        "reinforce_pp/frozen-no-baseline",
    ),
    Contrast(
        "reinforce_pp",
        "compares no samples: 256 prompts of one sample each will do",
        "samples to 0.9",
        "reinforce_pp/one-sample",
        "32 prompts of 8",
        "reinforce_pp",
        samples_to_goal,
    ),
    NoiseContrast(
        "reinforce_pp_baseline",
        "the mean of the group in place of the batch's alone",
        "reinforce_pp_baseline/frozen",
        "reinforce_pp",
        "reinforce_pp/frozen",
    ),
    Contrast(
        "gspo",
        "clips whole answers, and far more of them",
        "`clip_fraction`",
        "gspo",
        "grpo",
        "grpo",
        mean_of("clip_fraction"),
    ),
    Contrast(
        "cispo",
        "bounds weights, not tokens: what the others clip keeps its gradient (8 updates a step)",
        "`clip_fraction`",
        "cispo/many-updates",
        "grpo, which clips",
        "grpo/many-updates",
        mean_of("clip_fraction"),
    ),
    Contrast(
        "ppo",
        "the critic learns which answers will be right",
        "variance of the reward that it explains, last tenth of the run",
        "ppo",
        "first tenth",
        "ppo",
        explained(0.9, 1.0),
        explained(0.0, 0.1),
    ),
    Contrast(
        "decoupled_ppo",
        "age is not clipped (`max_staleness = 4`)",
        "`clip_fraction`",
        "decoupled_ppo/stale",
        "ppo",
        "ppo/stale",
        mean_of("clip_fraction"),
    ),
    Contrast(
        "grpo_async",
        "rollout does not wait for the trainer",
        "share of rollout's time without requests",
        "grpo_async",
        "`max_staleness = 0`",
        "grpo/on-policy",
        rollout_idle,
    ),
)


def _mean(records: Sequence[Record], measure: Callable[[Record], float | None]) -> float | None:
    values = [value for record in records if (value := measure(record)) is not None]
    return statistics.fmean(values) if values else None


def _noise(found: Found, label: str) -> float | None:
    small, large = (found.get(f"{label}-{batch}") for batch in sorted(NOISE_BATCHES))
    return noise_scale(small[0], large[0]) if small and large else None
