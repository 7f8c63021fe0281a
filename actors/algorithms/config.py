"""The [algorithm] section of a job, and what each algorithm's paper sets in it. Torch-free.

A field that is None is "as the algorithm's paper has it": `resolve` fills it in from `PAPERS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from actors.config import Section

CHOICES: dict[str, tuple[str, ...]] = {
    "ratio_level": ("token", "chunk", "sequence"),
    "normalization": ("group", "batch", "none"),
    "loss_aggregation": ("token", "sequence", "chunk", "sum"),
    "proximal": ("behaviour", "recomputed", "interpolated"),
    "correction": ("none", "token", "sequence"),
    "mask_level": ("none", "token", "sequence"),
    "kl_estimator": ("k1", "k2", "k3"),
    "kl_place": ("loss", "reward"),
    "critic": ("head", "model"),
    "gae_level": ("token", "turn"),
}


class AlgorithmConfig(Section, frozen=True, kw_only=True):
    """How rewards become gradients. Where a field is left out, the algorithm's paper says what it is."""

    name: str = "grpo"
    """The algorithm's file in actors/algorithms."""

    # The policy's loss.
    clip_low: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """The ratio is clipped below at 1 - clip_low (PPO, arXiv:1707.06347, section 3). CISPO has no bound below
    unless this is set (arXiv:2506.13585, section 3.1)."""
    clip_high: Annotated[float, Meta(gt=0)] | None = None
    """The ratio is clipped above at 1 + clip_high (clip-higher: DAPO, arXiv:2503.14476, section 3.1)."""
    dual_clip: Annotated[float, Meta(ge=0)] = 0.0
    """Where the advantage is negative, the surrogate is at least dual_clip times the advantage, so that a ratio far
    above one has no gradient (dual-clip PPO, arXiv:1912.09729, "Dual-clip PPO"). More than 1; 0 leaves it out."""
    ratio_level: str | None = None
    """Of what the policy ratio is: "token"; "chunk", the tokens of one turn together (an action chunk is one action,
    its probability the product of theirs); "sequence", their geometric mean (GSPO, arXiv:2507.18071, section 4.1)."""
    loss_aggregation: str | None = None
    """"token": mean over all tokens of the update (DAPO, section 3.3). "sequence": mean over sequences of the mean over
    their tokens (GRPO, arXiv:2402.03300, equation 3). "chunk": mean over turns of the mean over their tokens. "sum":
    mean over sequences of the sum over their tokens, over sum_length (Dr. GRPO, arXiv:2503.20783, section 3.2)."""
    sum_length: Annotated[int, Meta(ge=1)] = 1
    """The constant that loss_aggregation = "sum" divides by; Dr. GRPO takes the generation budget."""
    entropy_coefficient: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of the entropy bonus (PPO, section 5, equation 9)."""
    epochs: Annotated[int, Meta(ge=1)] = 1
    """Passes over the groups of a step (PPO, section 5, algorithm 1). With more than one update the step's groups wait
    for the last of them."""
    mini_batches: Annotated[int, Meta(ge=1)] = 1
    """Updates in a pass, each on the groups with one remainder of their number (PPO, section 5, algorithm 1)."""

    # Advantages.
    normalization: str | None = None
    """Divide advantages by their standard deviation in the "group" (GRPO, section 4.1.2), subtract the mean and divide
    by the deviation over the tokens of the whole "batch" (REINFORCE++, arXiv:2501.03262, section 3), or "none"."""
    gamma: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Discount from one token (or turn) to the next, for PPO and REINFORCE++ (GAE, arXiv:1506.02438, section 3)."""
    gae_lambda: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Between one-step (0) and Monte-Carlo (1) advantages (GAE, equation 16)."""
    gae_level: str = "token"
    """What a step of GAE is: a "token", or a "turn", whose tokens then share one advantage."""

    # The critic, where the algorithm has one.
    critic: str = "head"
    """A linear "head" on the policy's last layer, or a "model" of its own, begun as a copy of the policy."""
    value_coefficient: Annotated[float, Meta(ge=0)] = 0.5
    """Weight of the value loss (PPO, section 5, equation 9)."""
    value_clip: Annotated[float, Meta(ge=0)] = 0.2
    """A new value counts as no further than this from the old one where that makes the loss larger
    (arXiv:2005.12729, section 3); 0 leaves it out."""

    # A sampler that is older than the trainer, or disagrees with it.
    proximal: str | None = None
    """The policy that the ratio is taken against: the "behaviour" policy that sampled; the trainer's own, "recomputed"
    at the start of the step (arXiv:2110.00641, section 3; AReaL, arXiv:2505.24298, section 5.2); or "interpolated"
    between the two by the token's age in versions (A-3PO, arXiv:2512.06547)."""
    correction: str | None = None
    """Multiply the loss by the importance weight of the proximal policy (the current one for losses without a clipped
    ratio) to the behaviour policy: "none", by "token", or by the product over the "sequence"."""
    correction_cap: Annotated[float, Meta(ge=0)] = 2.0
    """The importance weight is truncated above at this (Ionides 2008, doi:10.1198/106186008X320456; V-trace,
    arXiv:1802.01561, section 4.1); 0 leaves it whole."""
    mask_level: str = "none"
    """Leave out a "token", or a "sequence" (by the geometric mean over its tokens), whose trainer-to-sampler ratio lies
    outside the band (IcePop, arXiv:2510.18855). What is left out still counts in the denominator."""
    mask_low: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    """Lower end of the band."""
    mask_high: Annotated[float, Meta(gt=1)] = 2.0
    """Upper end of the band."""

    # The reference: the policy at the start of the run.
    kl_coefficient: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of the KL divergence from the reference policy; 0 leaves it and the reference out."""
    kl_estimator: str | None = None
    """How a token's KL is estimated: "k1", "k2" or "k3" (http://joschu.net/blog/kl-approx.html). In the loss k2 has the
    gradient of the KL itself, k3 that of GRPO (equation 4), and k1 the value of k1 with the gradient of k2, its own
    being zero on average."""
    kl_place: str | None = None
    """In the "loss" (GRPO, section 4.1.1) or subtracted from the "reward" of each token (InstructGPT,
    arXiv:2203.02155, section 3.5), there under the policy that sampled."""

    # Which groups are trained on.
    dynamic_sampling: bool | None = None
    """Leave out groups whose samples all have one reward, as they have no advantage, and sample others in their place
    until the step's batch is full (DAPO, section 3.2, equation 11)."""
    filter_range: tuple[float, float] | None = None
    """[lowest, highest] mean of a group; others are left out too and sampled anew. Left out: any mean will do."""
    filter_key: str = "reward"
    """What filter_range is about: the "reward", or a number that the task gives with its episodes, as "correct"."""
    max_sampling_rounds: Annotated[int, Meta(ge=0)] = 10
    """Groups sampled for a step at most, in multiples of groups_per_step; then it takes what comes. DAPO's own runs end
    after 10; here a job ends when a step has nothing to train on at all. 0 is no limit."""

    # What rewards are made of.
    overlong_max_tokens: Annotated[int, Meta(ge=0)] = 0
    """Answers longer than this lose 1 (soft overlong punishment: DAPO, section 3.4, equation 13); 0 leaves it out."""
    overlong_cache_tokens: Annotated[int, Meta(ge=1)] = 1
    """Over so many tokens below overlong_max_tokens the penalty rises from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """What is known of an algorithm without loading it.

    settings: of the fields that are None by default    compares: it compares the samples of a group
    critic: it learns values
    """

    settings: Mapping[str, Any]
    compares: bool = True
    critic: bool = False


COMMON: dict[str, Any] = {
    "clip_low": 0.2,
    "clip_high": 0.2,
    "ratio_level": "token",
    "loss_aggregation": "token",
    "normalization": "none",
    "proximal": "behaviour",
    "correction": "none",
    "kl_estimator": "k3",
    "kl_place": "loss",
    "dynamic_sampling": False,
}
PAPERS: dict[str, Paper] = {
    "grpo": Paper(settings={"normalization": "group"}),
    "dr_grpo": Paper(settings={"loss_aggregation": "sum"}),
    "dapo": Paper(settings={"normalization": "group", "clip_high": 0.28, "dynamic_sampling": True}),
    "rloo": Paper(settings={"loss_aggregation": "sum", "kl_estimator": "k1", "kl_place": "reward"}),
    "reinforce_pp": Paper(
        settings={"normalization": "batch", "kl_estimator": "k1", "kl_place": "reward"},
        compares=False,
    ),
    "reinforce_pp_baseline": Paper(settings={"normalization": "batch", "kl_estimator": "k2"}),
    "gspo": Paper(
        settings={
            "normalization": "group",
            "ratio_level": "sequence",
            "loss_aggregation": "sequence",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
        }
    ),
    "cispo": Paper(settings={"normalization": "group", "clip_low": None, "clip_high": 3.0}),
    "ppo": Paper(
        settings={"normalization": "batch", "kl_estimator": "k1", "kl_place": "reward"},
        compares=False,
        critic=True,
    ),
    "decoupled_ppo": Paper(
        settings={
            "normalization": "batch",
            "kl_estimator": "k1",
            "kl_place": "reward",
            "proximal": "recomputed",
            "correction": "token",
        },
        compares=False,
        critic=True,
    ),
}
UNCLIPPED = ("rloo",)  # its importance weight is that of the current policy


def resolve(config: AlgorithmConfig) -> AlgorithmConfig:
    """Fill in what is left to the paper. The name is one of `PAPERS`."""
    settings = {**COMMON, **PAPERS[config.name].settings}
    missing = {key: value for key, value in settings.items() if getattr(config, key) is None}
    return msgspec.structs.replace(config, **missing)


def scope(config: AlgorithmConfig) -> str:
    """What advantages are computed from: one "sample", its "group", or the whole "batch" of the step."""
    if resolve(config).normalization == "batch":
        return "batch"
    return "group" if PAPERS[config.name].compares else "sample"


def reads_proximal(config: AlgorithmConfig) -> bool:
    """Whether the policy is read before the step's first update. With one update it is the current one all along."""
    return resolve(config).proximal == "recomputed" and config.epochs * config.mini_batches > 1


def broken_rule(config: AlgorithmConfig) -> tuple[str, str] | None:
    """The key that does not go with the others, and the sentence after its value; None when all do."""
    given, config = config, resolve(config)
    if config.normalization == "group" and not PAPERS[config.name].compares:
        return "normalization", f'is not for {config.name}, which compares no samples; use "batch"'
    if 0 < config.dual_clip <= 1:
        return "dual_clip", "must be more than 1, or 0 to leave it out; the paper takes 3.0"
    if (
        config.correction != "none"
        and config.proximal == "behaviour"
        and config.name not in UNCLIPPED
    ):
        return "correction", (
            'has nothing to correct where proximal = "behaviour", whose ratio is an importance weight '
            'already; set proximal = "recomputed" or "interpolated"'
        )
    if given.proximal is not None and config.name == "rloo":
        return "proximal", "is not read by rloo, whose loss has no ratio; leave it out"
    if config.filter_range is not None and config.filter_range[0] > config.filter_range[1]:
        return "filter_range", "is empty: the lowest mean comes first, as in [0.1, 0.9]"
    if given.filter_key != "reward" and config.filter_range is None:
        return (
            "filter_key",
            "is not read without filter_range; give the range too, as in [0.1, 0.9]",
        )
    if 0 < config.overlong_max_tokens < config.overlong_cache_tokens:
        return "overlong_max_tokens", (
            f"is below overlong_cache_tokens = {config.overlong_cache_tokens}, over which the penalty "
            "rises; use more"
        )
    return None
