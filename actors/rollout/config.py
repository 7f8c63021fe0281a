"""The [rollout] section of a job: generation."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section


class RolloutConfig(Section, frozen=True, kw_only=True):
    """Rollout actors: one replica a device, each with a generation engine."""

    devices: Annotated[int, Meta(ge=1)] = 2
    """Devices of the stage, which for one-device replicas is the number of rollout actors."""
    group_size: Annotated[int, Meta(ge=1)] = 8
    """Episodes per group: samples per prompt."""
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    """0 is greedy. Log-probs are those of the distribution that was sampled from."""
    top_k: Annotated[int, Meta(ge=0)] = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_new_tokens: Annotated[int, Meta(ge=1)] = 256
    """Tokens per turn."""
    max_context_tokens: Annotated[int, Meta(ge=2)] = 2048
    """Tokens per episode, prompts included; an episode that reaches it is truncated."""
    max_running: Annotated[int, Meta(ge=1)] = 256
    """Sequences that one engine runs at the same time (its KV-cache slots)."""
    adopt: str = "group"
    """When new weights are adopted: "group" (a started group finishes on its version), "turn", or "token"
    (in mid-generation; prefixes are prefilled again)."""
    dtype: str = "float32"
    """Weights and KV cache: "float32" or "bfloat16"."""
    python: str | None = None
    """Another interpreter for this stage; None is flowd's own."""
