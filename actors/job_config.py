"""A whole job file as one typed value; every actor of the job gets it. Torch-free."""

from msgspec import field

from actors.algorithms.config import AlgorithmConfig
from actors.conductor.config import EvalConfig, GuardsConfig, JobSection, MetricsConfig
from actors.config import Section
from actors.env.config import EnvConfig
from actors.inference.config import InferenceConfig
from actors.models.config import ModelConfig, PolicyConfig
from actors.rollout.config import RolloutConfig
from actors.trainer.config import CheckpointConfig, TrainerConfig, WarmupConfig

ENDLESS = 2**31  # turns: the simulator says when an episode is over


class JobConfig(Section, frozen=True, kw_only=True):
    """The resolved job.toml."""

    job: JobSection
    env: EnvConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    policy: PolicyConfig | None = None
    """A policy that acts on arrays; [model] is not read then."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    @property
    def max_turns(self) -> int:
        """Turns after which an episode is truncated."""
        if self.env.max_turns is not None:
            return self.env.max_turns
        return 1 if self.policy is None else ENDLESS

    @property
    def source_of_groups(self) -> str:
        """The kind of actor that the trainer gets groups from."""
        return "inference" if self.inference.gives("reference") else "env"

    @property
    def target_of_groups(self) -> str:
        """The kind of actor that env actors give finished groups to."""
        return "inference" if self.inference.gives("reference") else "trainer"
