"""The [trainer], [checkpoint] and [warmup] sections of a job."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section


class TrainerConfig(Section, frozen=True, kw_only=True):
    """The trainer: one replica of as many ranks as it has devices."""

    devices: Annotated[int, Meta(ge=1)] = 1
    """Devices of the stage: data-parallel ranks."""
    learning_rate: Annotated[float, Meta(gt=0)] = 1e-6
    """Adam's step size after warm-up of the schedule."""
    lr_warmup_steps: Annotated[int, Meta(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    lr_schedule: str = "constant"
    """After the rise: "constant", or "cosine", down to lr_min_fraction at the job's last step."""
    lr_min_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Of learning_rate, where "cosine" ends."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    """Decoupled weight decay (AdamW)."""
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    """Global gradient norm above which the gradient is scaled down."""
    micro_batch_tokens: Annotated[int, Meta(ge=1)] = 16384
    """Tokens (prompt and sampled) of one forward and backward pass; a longer sequence runs alone."""
    dtype: str = "float32"
    """Compute: "float32", or "bfloat16" with float32 master weights, gradients and moments."""
    weights: str = "full"
    """How new weights are published: "full", or "delta": what changed, for receivers that hold the version before.
    Worth it where the way to a receiver is slow, not within one node's memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Compile the blocks and what reads the logits (torch.compile): a minute once, faster steps after."""
    python: str | None = None
    """Another interpreter for this stage; None is flowd's own."""


class CheckpointConfig(Section, frozen=True, kw_only=True):
    """When the job commits."""

    every_steps: Annotated[int, Meta(ge=1)] = 1
    """Steps between two commits; a crash takes the job back to the last one."""
    keep: Annotated[int, Meta(ge=1)] = 2
    """Newest commits that stay on disk."""
    keep_every_steps: Annotated[int, Meta(ge=0)] = 0
    """Keep also every commit at a multiple of this, a multiple of `every_steps`; 0 keeps none."""
    keep_best: Annotated[int, Meta(ge=0)] = 0
    """Keep also this many commits that score best in evaluation."""


class WarmupConfig(Section, frozen=True, kw_only=True):
    """A short supervised phase before reinforcement, on the task's own worked examples. The result is cached."""

    steps: Annotated[int, Meta(ge=0)] = 0
    """Updates; 0 leaves the phase out."""
    until_reward: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """End it as soon as the expected reward is this: the mean probability of whole right answers, over 10 updates."""
    batch_size: Annotated[int, Meta(ge=1)] = 128
    """Examples per update."""
    learning_rate: Annotated[float, Meta(gt=0)] = 3e-3
    """Adam's step size; it rises over the first 20 updates."""
    temperature: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Divides the logits in the loss. Below 1 the policy is less sure than what it learnt would let it be, which
    leaves reinforcement more to explore where `until_reward` stops early."""
