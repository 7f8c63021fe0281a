"""The [model] and [policy] sections of a job: a language model, or in its place a policy that acts on arrays.

[model] is a Hugging Face folder, or a small Qwen2 made from its numbers. [policy] says the sizes of what the policy
sees and does itself, rather than asking the simulator: trainer and rollout may run where none is, and a checkpoint says
what it is. An env actor compares them with its simulator at the start.
"""

from typing import Annotated

from msgspec import Meta, field

from actors.config import Section

Size = Annotated[int, Meta(ge=1)]
KINDS = ("actor_critic", "tokens")


class LoraConfig(Section, frozen=True, kw_only=True):
    """An adapter that is trained instead of the model (LoRA, arXiv:2106.09685)."""

    rank: Annotated[int, Meta(ge=1)] = 16
    """Width of the adapter (section 4.1: r)."""
    alpha: Annotated[int, Meta(ge=1)] = 32
    """The adapter's product is scaled by alpha / rank (section 4.1)."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Which layers get one, by the last part of their names: ["q_proj", "v_proj"]. "all-linear": all but the head."""

    @property
    def scale(self) -> float:
        """Of the adapter's product."""
        return self.alpha / self.rank


class ModelConfig(Section, frozen=True, kw_only=True):
    """What is trained. With `path` the other fields are not read, but for lora."""

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
    lora: LoraConfig | None = None
    """[model.lora]: train an adapter, and keep the model as it is. Also with `path`."""
    tokenizer: str = "characters"
    """The built-in tokenizer: "characters" (digits, letters, punctuation, one token each, with a chat template)."""


class PolicyConfig(Section, frozen=True, kw_only=True):
    """What is trained where episodes come from a simulator."""

    kind: str = "actor_critic"
    """"actor_critic": an MLP, behind a CNN where observations are images. "tokens": a transformer over image patches,
    instruction and proprioception that emits discretised action tokens, the shape of OpenVLA (arXiv:2406.09246)."""
    path: str | None = None
    """A folder of `flowctl export` with the weights to begin with, of a policy with the same numbers; None draws them
    from `job.seed`."""
    observation: dict[str, list[Size]]
    """Arrays of an observation and their shapes: [n] are numbers, [height, width, 3] is an image."""
    instruction: str | None = None
    """The array of the observation (uint8 [bytes], zero-padded UTF-8) that holds the instruction, for "tokens"."""
    action: Size
    """Numbers in an action, or, with `discrete`, how many actions there are."""
    discrete: bool = False
    """The action is one of a finite number."""
    low: list[float] | float = -1.0
    """The smallest action, one for all of its numbers or each its own."""
    high: list[float] | float = 1.0
    """The largest action."""
    chunk: Size = 1
    """Actions that the policy gives at a time; the simulator runs them one after the other."""
    hidden: list[Size] = field(default_factory=lambda: [128, 128])
    """Widths of the MLP's layers."""
    image_width: Size = 256
    """Numbers that the CNN makes of the images."""
    squash: bool = False
    """tanh takes the Gaussian's sample to the action's bounds (SAC, arXiv:1801.01290, appendix C); without it, the
    sample is clipped there, and its log-prob is that before clipping."""
    std_by_state: bool = False
    """The deviation is an output of the network rather than a parameter of its own."""
    initial_log_std: float = 0.0
    """Natural logarithm of the Gaussian's deviation at the start, the action's bounds being -1 and 1."""
    normalize_observations: bool = True
    """Arrays that are no images are shifted and scaled by mean and deviation of what was trained on so far."""
    normalize_returns: bool = True
    """Rewards are divided by the deviation of the discounted returns so far."""
    width: Size = 64
    """Width of the transformer's residual stream."""
    layers: Size = 2
    """Its blocks."""
    heads: Size = 4
    """Its attention heads."""
    patch: Size = 8
    """Pixels of an image patch's side."""
    bins: Annotated[int, Meta(ge=2)] = 256
    """Action tokens: equal intervals between the lowest and the highest action; a token is the centre of its interval
    (OpenVLA, section 3.2)."""


def broken_rule(policy: PolicyConfig) -> tuple[str, str] | None:
    """The key that does not go with the others, and the sentence after its value; None when all do."""
    if policy.kind not in KINDS and ":" not in policy.kind:
        return "kind", f"is not known; use {', '.join(KINDS)}, or an import path, module:Class"
    if not policy.observation:
        return (
            "observation",
            "names no array; give what the simulator shows, as in { state = [39] }",
        )
    for name, shape in policy.observation.items():
        if len(shape) not in (1, 3) or (len(shape) == 3 and shape[2] != 3):
            return (
                "observation",
                f"has {name} = {shape}; write [n] for numbers, [height, width, 3] for an image",
            )
    for key, bound in (("low", policy.low), ("high", policy.high)):
        if isinstance(bound, list) and len(bound) != policy.action:
            return (
                key,
                f"has {len(bound)} numbers for action = {policy.action}; give one for each, or one for all",
            )
    if not policy.discrete and any(a >= b for a, b in zip(*bounds(policy), strict=True)):
        return "low", "is not below high; give the smallest action and the largest"
    if policy.discrete and policy.kind == "tokens":
        return (
            "discrete",
            'does not go with kind = "tokens", whose tokens are bins of continuous actions',
        )
    if policy.kind == "tokens":
        return _broken_token_rule(policy)
    if policy.instruction is not None:
        return "instruction", 'is read by kind = "tokens" only'
    return None


def _broken_token_rule(policy: PolicyConfig) -> tuple[str, str] | None:
    if policy.width % (2 * policy.heads):
        return "width", f"is not a multiple of twice heads = {policy.heads} (heads of even width)"
    for name, shape in policy.observation.items():
        if len(shape) == 3 and (shape[0] % policy.patch or shape[1] % policy.patch):
            return "patch", f"does not divide the sides of {name} = {shape}"
    if policy.instruction is not None and len(policy.observation.get(policy.instruction, ())) != 1:
        return (
            "instruction",
            "is not an array of bytes in observation; write its length there, as in [64]",
        )
    return None


def bounds(policy: PolicyConfig) -> tuple[list[float], list[float]]:
    """Lowest and highest action, a number for each dimension."""
    low = policy.low if isinstance(policy.low, list) else [policy.low] * policy.action
    high = policy.high if isinstance(policy.high, list) else [policy.high] * policy.action
    return low, high
