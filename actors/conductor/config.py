"""The [job], [eval], [guards] and [metrics] sections: what the conductor holds the job to."""

import inspect
from typing import Annotated, Any

from msgspec import Meta, field

from actors.config import Section
from actors.env.config import EnvConfig
from sim.registry import find


class JobSection(Section, frozen=True, kw_only=True):
    """The job as a whole."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Names the run directory; letters, digits, dot, dash, underscore."""
    steps: Annotated[int, Meta(ge=0)]
    """Trainer steps. 0 trains nothing: the model is evaluated as it is, without a trainer."""
    groups_per_step: Annotated[int, Meta(ge=1)] = 32
    """Groups that one step trains on."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Keys every random draw."""
    mode: str = "disaggregated"
    """"disaggregated": each stage keeps its devices. "collocated": rollout and trainer take turns on the same."""
    max_staleness: Annotated[int, Meta(ge=0)] = 0
    """Policy versions that a trained token may lag behind; 0 is strictly on-policy."""
    deterministic: bool = False
    """Fix batch composition and order of consumption: the same steps on the same groups, every run."""
    stop_reward: float | None = None
    """End the job early once the mean reward of the last `stop_window` steps is at least this."""
    stop_window: Annotated[int, Meta(ge=1)] = 5
    """Steps that `stop_reward` averages over."""


class EvalConfig(Section, frozen=True, kw_only=True):
    """Evaluations of the policy beside its training."""

    every_steps: Annotated[int, Meta(ge=0)] = 0
    """Evaluate before the first step, after every so many, and at the end; 0 never, unless `job.steps = 0`."""
    task: str = ""
    """As `env.task`; empty is the job's own task."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task; for the job's own, what differs from `env.args`. A task with a `split` gets "eval"."""
    problems: Annotated[int, Meta(ge=1)] = 100
    """Problems, the same in every evaluation."""
    k: Annotated[int, Meta(ge=0)] = 1
    """Samples of each problem, for mean@k and pass@k; 0 leaves sampling out."""
    temperature: Annotated[float, Meta(gt=0)] | None = None
    """Of these samples; None is `rollout.temperature`."""
    greedy: bool = True
    """One more sample of each problem, of the likeliest tokens."""
    seed: Annotated[int, Meta(ge=0)] = 0
    """Chooses problems and keys the draws; `job.seed` has no part in it."""
    success: str = "reward"
    """What counts as solved for pass@k: "reward", or a number in the task's `info`, at least `success_at`."""
    success_at: float = 1.0
    """See `success`."""
    by: str = ""
    """A text in the task's `info`, such as "source": the results are given for each of its values too."""
    record: Annotated[int, Meta(ge=0)] = 2
    """Problems whose samples are written to eval_samples.jsonl."""
    videos: Annotated[int, Meta(ge=0)] = 0
    """Problems of a simulator that are filmed (the first sample of each way of decoding), for RUN/videos/."""


def evaluates(job: JobSection, evaluation: EvalConfig) -> bool:
    """Whether the job has evaluations at all."""
    return bool(evaluation.every_steps) or not job.steps


def evaluation_env(env: EnvConfig, evaluation: EvalConfig) -> tuple[str, dict[str, Any]]:
    """Task and arguments that evaluations play. Loads the task's module; raises SimError where there is none."""
    task = evaluation.task or env.task
    args = dict(evaluation.args) if evaluation.task else env.args | evaluation.args
    parameters = inspect.signature(find(task)).parameters
    if "split" not in evaluation.args and "split" in parameters:
        args["split"] = "eval"
    if evaluation.videos and "render" in parameters:
        args["render"] = True
    return task, args


class GuardsConfig(Section, frozen=True, kw_only=True):
    """What ends a job with a reason rather than letting it waste a night."""

    max_kl: float | None = None
    """Sampler-trainer KL (k3 estimate, nats per token) above which the job stops."""
    constant_reward_steps: Annotated[int, Meta(ge=0)] = 100
    """Steps in a row with one and the same reward on every sample; 0 turns the guard off."""
    no_progress_s: Annotated[float, Meta(ge=0)] = 600.0
    """Seconds without a trainer step; 0 turns the guard off."""


class MetricsConfig(Section, frozen=True, kw_only=True):
    """What is written down."""

    samples_per_step: Annotated[int, Meta(ge=0)] = 2
    """Episodes per step in samples.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard files."""
