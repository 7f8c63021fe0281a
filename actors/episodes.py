"""The one data model for text and robots: actions, turns, segments, groups. numpy only, no torch.

An episode is a list of turns: observation → action → reward. One-shot mathematics is one turn, an agent with tools
several, a robot hundreds. A segment is a run of consecutive turns of one episode and may start and end in mid-episode.
The work unit that is issued, trained and accounted for is the group: the segments of `group_size` episodes that
started from the same seed.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The transform between the policy's distribution and the one that was sampled from."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    vocabulary: tuple[int, int] | None = (
        None  # [first, last) token ids that may be sampled; None is all
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What the policy did in one turn.

    For text, `prompt` are the tokens that the turn's new messages became, and `tokens` what was sampled after them:
    the model's whole context is the concatenation of prompt and tokens of every turn so far, and is never tokenized
    again. For robots `tokens` are the action tokens of the chunk, or empty where the policy has none, and `chunk` is
    what the simulator runs.

    What has a log-prob is a unit: a token, or where there are none a step of the chunk.

    prompt: int32 [prompt_tokens]      tokens: int32 [tokens]
    logprobs: float32 [units], under the sampled-from distribution   versions: int32 [units], the policy version
    mask: bool [units], False where a token or step is invalid (a step that was not run) and carries no loss
    value: the critic's estimate at the observation, if there is a critic
    chunk: float32 [steps, action], or int64 [steps] of discrete actions, in the simulator's units; None for text
    recompute: tensors that belong to the policy (a VLA's exact inputs, denoising states); nobody else reads them
    """

    prompt: Int32
    tokens: Int32
    logprobs: Float32
    versions: Int32
    mask: Bool
    text: str = ""
    finish: str = "stop"  # "stop", "length"
    sampling: Sampling = field(default_factory=Sampling)
    value: float | None = None
    chunk: NDArray[Any] | None = None
    recompute: dict[str, Any] = field(default_factory=dict)

    @property
    def num_units(self) -> int:
        """What has a log-prob: tokens, or steps of the chunk."""
        return len(self.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One observation (as its record: text, or None where too large to keep), the action, and its reward.

    computed: what inference actors add on the way to the trainer, by name: float32 [tokens], in line with the action's;
    "reference", log-probs under the reference policy
    """

    observation: Any
    action: Action
    reward: float
    computed: dict[str, Float32] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReading:
    """What policy and critic of one version say of a segment's trained tokens, by an inference actor.

    proximal: float32 [trained], log-probs    values: float32 [trained], before each token    None: not asked for
    last_value: the critic's after the segment's last token
    """

    version: int
    proximal: Float32 | None = None
    values: Float32 | None = None
    last_value: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive turns of one episode. `bootstrap`: the observation after the last turn where it was truncated.

    reading: of the version that the step begins with which trains it, where inference actors give it
    """

    sample: int  # index within the group
    turns: tuple[Turn, ...]
    first_turn: int = 0
    terminated: bool = True
    truncated: bool = False
    bootstrap: Any = None
    info: dict[str, float | str] = field(default_factory=dict)
    reading: PolicyReading | None = None

    @property
    def episode_return(self) -> float:
        """Sum of the rewards of the segment's turns, undiscounted."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def num_tokens(self) -> int:
        """Tokens (or steps, of a policy without tokens) that the policy sampled in this segment."""
        return sum(turn.action.num_units for turn in self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The work unit: the segments of episodes that started from one seed.

    group: index in the job, counted from 0    attempt: how often this index was issued before (0 at first)
    run_attempt: how often the job had been rolled back when it was issued
    """

    group: int
    attempt: int
    run_attempt: int
    seed: int
    segments: tuple[Segment, ...]

    @property
    def rewards(self) -> Float32:
        """float32 [segments]"""
        return np.array([segment.episode_return for segment in self.segments], dtype=np.float32)

    @property
    def versions(self) -> Int32:
        """int32 [units of all turns]: the policy version that sampled each.

        Joined, because numpy takes as long for the few units of one turn as for those of all.
        """
        versions = [turn.action.versions for segment in self.segments for turn in segment.turns]
        return np.concatenate(versions) if versions else np.zeros(0, dtype=np.int32)

    @property
    def min_version(self) -> int:
        """The oldest policy version that sampled any token of the group."""
        return int(self.versions.min())

    @property
    def num_tokens(self) -> int:
        """Tokens that the policy sampled in this group."""
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One sample of a group in one turn: what the policy is to go on from.

    history: int32 [tokens so far], of every turn before; empty in the first    observation: what is new since then
    prompt, sampled (with log-probs and versions): what an earlier holder of the request made of it, and `finish` where
    the sample had already ended
    """

    sample: int
    history: Int32
    observation: Any
    prompt: Int32 | None = None
    sampled: Int32 | None = None
    sampled_logprobs: Float32 | None = None
    sampled_versions: Int32 | None = None
    finish: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """What an env actor asks of a rollout actor: an action for every sample of a group that goes on.

    version: sampled with exactly this policy version if `exact`, else with at least it
    sampling: the transform to sample with; None is the job's
    key: what the draws of each sample and turn are keyed by; None is the job's seed and the group
    """

    group: int
    attempt: int
    run_attempt: int
    turn: int
    version: int
    exact: bool
    samples: tuple[SampleRequest, ...]
    sampling: Sampling | None = None
    key: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingRequest:
    """What a trainer asks of an inference actor: how exactly this version's policy and critic read a group.

    Answered with a `PolicyReading` for each of its segments, in their order.
    """

    group: Group
    run_attempt: int
    version: int
