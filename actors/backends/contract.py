"""What rollout actors ask of a generation engine, and trainers of a training engine. Torch-free to import.

Both are synchronous and single-threaded: an actor calls them from its worker thread only, one call at a time.
Parameters travel under their Hugging Face names, unfused, tied ones listed once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actors.episodes import Float32, Group, Int32, PolicyReading, Sampling

if TYPE_CHECKING:
    import torch

    from channels.weights.delta import WeightsDelta

ADAPTER = "adapter."  # in front of the names of an adapter's tensors in a training engine's state
BASE = "base"  # in such a state: the checksum of the frozen model
# The folder, beside the policy's host copy, of the critic's for inference actors.
CRITIC_WEIGHTS = "critic"


def _no_tokens() -> Int32:
    return np.zeros(0, dtype=np.int32)


def _no_logprobs() -> Float32:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to continue.

    context: int32 [c], every token so far (history and new prompt)
    sampled, sampled_logprobs, sampled_versions: [r], what an earlier engine already sampled for this request before
    it was aborted; it is re-prefilled, kept as it is, and counts towards max_new_tokens
    key: the 64-bit key of `actors.randomness`; the draw of the i-th new token (i counted from 0, the already sampled
    ones included) is uniform(key, i), so an aborted and resumed request draws what it would have drawn
    """

    request_id: int
    context: Int32
    max_new_tokens: int
    key: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: tuple[int, ...] = ()
    sampled: Int32 = field(default_factory=_no_tokens)
    sampled_logprobs: Float32 = field(default_factory=_no_logprobs)
    sampled_versions: Int32 = field(default_factory=_no_tokens)
    batch: int | None = (
        None  # requests with the same number run as one fixed batch (deterministic mode)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came of a request. tokens include a stop token if one was sampled. finish: "stop", "length", "aborted"."""

    request_id: int
    tokens: Int32
    logprobs: Float32
    versions: Int32
    finish: str


class GenerationEngine(Protocol):
    """Continuous batching: sequences that end make room for new ones between two calls of `step`."""

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot or wait inside the engine for one."""
        ...

    @property
    def free_slots(self) -> int:
        """Requests that can be added now."""
        ...

    @property
    def version(self) -> int:
        """The policy version of the weights in use; -1 before the first."""
        ...

    def can_admit(self, request: GenerationRequest) -> bool:
        """Whether `add` would find room now. Raises ValueError for a request that could never fit."""
        ...

    def add(self, request: GenerationRequest) -> None:
        """Admit a request; it is prefilled by the next `step`."""
        ...

    def step(self) -> list[Generation]:
        """Advance every running sequence by one token (prefilling new ones first); returns those that ended."""
        ...

    def abort(self, request_ids: Iterable[int] | None = None) -> list[Generation]:
        """Stop sequences (all when None) and return them with the tokens they have, finish "aborted"."""
        ...

    def load_weights(
        self, version: int, weights: "Mapping[str, torch.Tensor] | WeightsDelta"
    ) -> None:
        """Replace the weights. Running sequences keep their tokens and have their prefix re-prefilled.

        Raises WeightsMismatch for a delta from other weights than those in use, which are lost then: load others.
        """
        ...

    def load_adapter(
        self, version: int, adapter: "Mapping[str, torch.Tensor]", scale: float
    ) -> None:
        """Put a LoRA adapter on top of the weights that were loaded, in place of the one before. Running sequences fare
        as with `load_weights`, which takes it off.

        adapter: "LAYER.lora_A" [rank, in] and "LAYER.lora_B" [out, rank]    scale: of their product
        """
        ...

    def weights_in_place(self) -> "Mapping[str, torch.Tensor]":
        """The tensors that it computes with, by name, for whoever writes new weights into them between two steps.

        They are others after `offload` and `onload`. Empty where the engine has none that can be written so.
        """
        ...

    def weights_replaced(self, version: int) -> None:
        """All of them have been written: as after `load_weights`."""
        ...

    def offload(self) -> None:
        """Give up device memory (KV cache dropped, weights to host). Only with no running sequence."""
        ...

    def onload(self) -> None:
        """Take device memory again; the weights are those of before."""
        ...

    def memory_bytes(self) -> int:
        """Device memory held now: weights and KV cache."""
        ...


class TrainingEngine(Protocol):
    """One rank of a data-parallel trainer. Gradients accumulate as unnormalised sums and are divided once.

    A step is: begin_step, then accumulate any number of times (a rank may get none), then finish_step on every rank.
    The result does not depend on how the groups were split over calls, micro-batches or ranks.
    """

    def begin_step(self) -> None: ...

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Forward and backward over the segments of complete groups, in micro-batches by token budget."""
        ...

    def finish_step(self) -> dict[str, float]:
        """Reduce over ranks, divide by the global denominator, clip, update. Returns metrics, equal on all ranks."""
        ...

    def weights(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """The parameters under Hugging Face names, on the host or the device, not to be changed.

        Each is a plain tensor that every rank has whole, or a DTensor over all ranks: `channels.weights.sharded` copies
        a rank's part of it, and converts to the dtype that is published as it copies. No copy is to be made here.

        Of a job that trains an adapter they are the frozen model's, and `adapter` is what goes on top of them.
        """
        ...

    def critic_weights(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """The critic's parameters as `weights` gives the policy's, none without a critic: for inference actors."""
        ...

    def adapter(self) -> "Mapping[str, torch.Tensor]":
        """The trained matrices of a LoRA adapter, "LAYER.lora_A" [rank, in] and "LAYER.lora_B" [out, rank], in their
        own precision; nothing where the model itself is trained."""
        ...

    def state(self) -> "dict[str, torch.Tensor]":
        """All that a restart needs (parameters, optimizer moments, step counter) as a flat mapping.

        Not copies: the next step changes them. DTensors where a rank has a shard, plain tensors where each has all.
        The policy's parameters are "model.NAME", the critic's "model.critic.NAME". With an
        adapter "adapter.NAME" is there in place of the policy's, and "base", a checksum of the frozen model.
        """
        ...

    def load_state(self, state: "Mapping[str, torch.Tensor]") -> None:
        """Go on from a state. With an adapter it may hold the frozen model too, as "model.NAME"; where it does not, the
        engine's own has to be the right one, by its checksum. Raises ValueError for a state that does not fit,
        BadCheckpoint for another frozen model."""
        ...

    def offload(self) -> None: ...

    def onload(self) -> None: ...

    def memory_bytes(self) -> int: ...


class InferenceEngine(Protocol):
    """Models that are read and never trained: the run's reference policy, and policy and critic of a version."""

    def read_reference(self, group: Group) -> Group:
        """The group with the reference's log-probs of its trained tokens as `computed["reference"]` of every turn."""
        ...

    def load_policy(
        self,
        version: int,
        policy: "Mapping[str, torch.Tensor]",
        critic: "Mapping[str, torch.Tensor]",
    ) -> None:
        """Replace the weights of both, by name. critic: empty where values are not asked for. Takes an adapter off."""
        ...

    def load_adapter(self, adapter: "Mapping[str, torch.Tensor]", scale: float) -> None:
        """Put a LoRA adapter on top of the policy that was loaded: the version is with it."""
        ...

    def read_policy(self, group: Group) -> tuple[PolicyReading, ...]:
        """What the loaded version says of each segment, in their order."""
        ...

    def offload(self) -> None: ...

    def onload(self) -> None: ...

    def memory_bytes(self) -> int: ...


class Policy(Protocol):
    """Turns an env's observation into engine input, and the engine's output into an Action (text policies)."""

    def encode(self, history: Int32, observation: Any) -> Int32:
        """Tokens that the new messages become after `history` (empty at the first turn). Never re-tokenizes history."""
        ...

    def decode(self, tokens: Int32) -> str:
        """The text of sampled tokens, special tokens left out."""
        ...

    @property
    def stop_tokens(self) -> tuple[int, ...]: ...
