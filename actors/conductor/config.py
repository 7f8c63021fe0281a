"""The [job] and [guards] sections: what the conductor holds the job to."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section


class JobSection(Section, frozen=True, kw_only=True):
    """The job as a whole."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Names the run directory; letters, digits, dot, dash, underscore."""
    steps: Annotated[int, Meta(ge=1)]
    """Trainer steps."""
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
