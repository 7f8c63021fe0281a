"""Messages between the actors of a job beside its channels: the policy clock, admission to steps, ranks.

Channels of a job (names and payloads):
    "tickets"   conductor → env       Ticket as a dict; acknowledged when the trainer has the group
    "requests"  env → rollout         the turn of a group: see actors/env/actor.py; acknowledged with the actions
    "groups"    env → trainer         a Group; acknowledged when the trainer holds it. With inference actors
                                      env → inference → trainer: they pass it on with what they computed

New weights are announced by `channels.weights.WeightsPublished`, trainer to conductor to rollouts: in order, and to an
actor that joins late the newest.
"""

from channels.messages import Message


class TrainerReady(Message, frozen=True, tag="trainer_ready"):
    """Trainer to conductor: weights stand at this step; sent once per trainer process, and per new conductor."""

    epoch: int
    step: int
    run_attempt: int  # of the commit that was loaded


class BeginRun(Message, frozen=True, tag="begin_run"):
    """Conductor to trainer: publish your weights as this run attempt's version `step` and take groups."""

    run_attempt: int
    step: int


class GroupReceived(Message, frozen=True, tag="group_received"):
    """Trainer to conductor: a finished group is here; admit it or have it dropped."""

    group: int
    attempt: int
    run_attempt: int
    min_version: int
    max_version: int
    tokens: int
    rewards: list[float]
    info: dict[str, float]


class Admit(Message, frozen=True, tag="admit"):
    """Conductor to trainer: train this group in this step. `last`: the step's batch is complete with it."""

    group: int
    attempt: int
    step: int
    order: int  # position in the step
    last: bool
    commit: bool  # commit after this step


class Drop(Message, frozen=True, tag="drop"):
    """Conductor to trainer: forget this group (a duplicate, or from before a rollback)."""

    group: int
    attempt: int


class StepDone(Message, frozen=True, tag="step_done"):
    """Trainer to conductor: the step was taken, its weights were published; metrics of the update."""

    run_attempt: int
    step: int
    policy_version: int
    metrics: dict[str, float]
    weights_variant: str | None = None  # that was published; None when nothing was


class StepRecorded(Message, frozen=True, tag="step_recorded"):
    """Conductor to trainer: the step's metrics are written, so that a commit may contain it."""

    run_attempt: int
    step: int


class Committed(Message, frozen=True, tag="committed"):
    """Trainer to conductor: the manifest of this step is visible."""

    run_attempt: int
    step: int
    policy_version: int
    seconds: float = 0.0  # that writing took, beside the training


class CommitAndPause(Message, frozen=True, tag="commit_and_pause"):
    """Conductor to trainer: commit what you have at this step boundary, take no further step, and answer `Paused`."""


class Paused(Message, frozen=True, tag="paused"):
    """Trainer to conductor: this step is committed, and no other will be taken until a run begins."""

    run_attempt: int
    step: int


class RankCommand(Message, frozen=True, tag="rank_command"):
    """Leader to the other ranks of a trainer: "begin", "accumulate" (payload: groups), "finish", "publish" (payload:
    the file that its parts of the weights go into), "offer" (them on its GPU), "commit", "park"."""

    command: str
    run_attempt: int
    step: int


class RankReply(Message, frozen=True, tag="rank_reply"):
    """Rank to its leader: the command was carried out."""

    rank: int
    command: str
    step: int


class AskCall(Message, frozen=True, tag="ask_call"):
    """Conductor to every other actor, when no step comes: which blocking call are you in? Answered by `InCall`."""


class InCall(Message, frozen=True, tag="in_call"):
    """Actor to conductor: what its worker thread does. The loop says so, also while the call hangs."""

    call: str  # name and place of the call; "" for none
    seconds: float  # since it began


class StageTimes(Message, frozen=True, tag="stage_times"):
    """Env, rollout and inference actors to conductor, once a step: seconds of their life so far, by what they did."""

    seconds: dict[str, float]
