"""The [model] section of a job: a Hugging Face folder, or a small Qwen2 made from these numbers."""

from typing import Annotated

from msgspec import Meta

from actors.config import Section


class ModelConfig(Section, frozen=True, kw_only=True):
    """What is trained. With `path` the other fields are not read."""

    path: str | None = None
    """A Hugging Face model folder with config, weights and tokenizer."""
    hidden_size: Annotated[int, Meta(ge=8)] = 128
    """Width of the residual stream."""
    num_layers: Annotated[int, Meta(ge=1)] = 2
    """Transformer blocks."""
    num_heads: Annotated[int, Meta(ge=1)] = 4
    """Attention heads; also key and value heads."""
    intermediate_size: Annotated[int, Meta(ge=8)] = 512
    """Width of the MLP."""
    initializer_range: Annotated[float, Meta(gt=0)] = 0.02
    """Standard deviation of the random weights; small models learn sooner near 1 / sqrt(hidden_size)."""
    rope_theta: Annotated[float, Meta(gt=0)] = 10_000.0
    """Base of the rotary position embedding; for texts of tens of tokens smaller ones tell places apart sooner."""
    tokenizer: str = "characters"
    """The built-in tokenizer: "characters" (digits, letters, punctuation, one token each, with a chat template)."""
