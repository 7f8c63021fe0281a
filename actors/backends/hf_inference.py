"""Transformers causal LMs that are read and never trained, the way the training engine reads its own: a run's reference
policy, and the policy and critic that a step begins with."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.backends.hf_adapter import UnmergedAdapter
from actors.backends.hf_weights import ModelWeights
from actors.backends.packing import PackedBatch
from actors.backends.token_logprobs import TokenLogprobs
from actors.backends.training_batches import REFERENCE, lay_out, micro_batches
from actors.episodes import Float32, Group, PolicyReading, Segment, Turn
from actors.trainer.config import TrainerConfig

HOST = torch.device("cpu")


class HFInferenceEngine:
    """`InferenceEngine` of actors.backends.contract. Moves its models to `device` and from then on owns them.

    reference: the run's, if it is to be read
    policy: of the kind that the trainer has, whose weights `load_policy` replaces, if it is to be read
    critic: read with it, of [algorithm] critic, if values are asked for    proximal: whether log-probs are
    config: for precision and micro-batches
    """

    def __init__(
        self,
        *,
        config: TrainerConfig,
        device: str | torch.device,
        reference: Any = None,
        policy: Any = None,
        critic: str | None = None,
        proximal: bool = False,
    ) -> None:
        self._device = torch.device(device)
        self._reference = None if reference is None else _Frozen(reference, None, config, device)
        self._policy = None if policy is None else _Frozen(policy, critic, config, device)
        self._proximal = proximal
        self._version = -1
        self._resident = True

    def read_reference(self, group: Group) -> Group:
        """See the contract. Where a token is not trained, the log-prob is 0."""
        assert self._reference is not None
        read = self._reference.read(group)
        segments = (
            replace(segment, turns=tuple(_turns(segment, each.logprobs)))
            for segment, each in zip(group.segments, read, strict=True)
        )
        return replace(group, segments=tuple(segments))

    def load_policy(
        self, version: int, policy: Mapping[str, Tensor], critic: Mapping[str, Tensor]
    ) -> None:
        """See the contract. Raises ValueError for weights of another model; what is loaded is not to be used then."""
        assert self._policy is not None
        assert self._resident
        self._version = -1
        self._policy.load(policy, critic)
        self._version = version

    def load_adapter(self, adapter: Mapping[str, Tensor], scale: float) -> None:
        """See the contract. Raises ValueError for an adapter of another model; then none is to be used."""
        assert self._policy is not None
        assert self._resident
        self._policy.adapter.load(adapter, scale)

    def read_policy(self, group: Group) -> tuple[PolicyReading, ...]:
        """See the contract."""
        assert self._policy is not None
        assert self._version >= 0, "no weights were loaded"
        return tuple(
            PolicyReading(
                version=self._version,
                proximal=each.logprobs.astype(np.float32) if self._proximal else None,
                values=None if each.values is None else each.values.astype(np.float32),
                last_value=each.last_value,
            )
            for each in self._policy.read(group)
        )

    def offload(self) -> None:
        """The weights to the host. On CPU they stay: device and host are one."""
        for frozen in self._models():
            frozen.reader.to(HOST)
        if self._device.type != "cpu":
            torch.cuda.empty_cache()
        self._resident = False

    def onload(self) -> None:
        """The weights to the device."""
        for frozen in self._models():
            frozen.reader.to(self._device)
        self._resident = True

    def memory_bytes(self) -> int:
        """Device memory held now: the weights."""
        if not self._resident:
            return 0
        return sum(
            frozen.adapter.size_bytes() + sum(p.nbytes for p in frozen.reader.parameters())
            for frozen in self._models()
        )

    def _models(self) -> "list[_Frozen]":
        return [frozen for frozen in (self._reference, self._policy) if frozen is not None]


class _Read:
    """Of one segment: logprobs and values (None without a critic), float64 [trained], and the value at its end."""

    __slots__ = ("last_value", "logprobs", "values")

    def __init__(self, values: NDArray[np.float64] | None) -> None:
        self.logprobs: NDArray[np.float64] = np.zeros(0)
        self.values = values
        self.last_value = 0.0


class _Frozen:
    """A model, with a critic or without, in the precision that the trainer computes in."""

    def __init__(
        self, model: Any, critic: str | None, config: TrainerConfig, device: str | torch.device
    ) -> None:
        self._device = torch.device(device)
        self._budget_tokens = config.micro_batch_tokens
        self._model = model.to(self._device).eval()
        self._dtype = next(model.parameters()).dtype
        self.adapter = UnmergedAdapter(self._model, self._device)
        self.reader = TokenLogprobs(self._model, critic).eval().requires_grad_(False)
        if config.dtype == "bfloat16":  # as the trainer computes; buffers stay as they are there
            exact = {p for module in self.reader.exact() for p in module.parameters()}
            for parameter in self.reader.parameters():
                if parameter not in exact:
                    parameter.data = parameter.data.bfloat16()

    def load(self, policy: Mapping[str, Tensor], critic: Mapping[str, Tensor]) -> None:
        """Replace the weights by name. Raises ValueError where they are of another model."""
        ModelWeights(self._model, self._device, buffers=True).load(policy)
        self.adapter.clear()
        if self.reader.critic is not None:
            ModelWeights(self.reader.critic, self._device).load(critic)

    @torch.no_grad()
    def read(self, group: Group) -> list[_Read]:
        """In the order of the group's segments; nothing of a segment without trained tokens."""
        sequences = lay_out([group]).sequences
        nothing = np.zeros(0) if self.reader.has_critic else None
        found = {id(segment): _Read(nothing) for segment in group.segments}
        for batch in micro_batches(sequences, self._budget_tokens):
            packed = PackedBatch(batch, self._device)
            read = self.reader(packed, self._dtype)
            for sequence, logprobs in packed.by_sequence(read.logprobs):
                found[id(sequence.segment)].logprobs = logprobs
            if read.values is None:
                continue
            for sequence, values in packed.by_sequence(read.values):
                found[id(sequence.segment)].values = values
            for sequence, value in zip(batch, read.last_values.tolist(), strict=True):
                found[id(sequence.segment)].last_value = value
        return list(found.values())


def _turns(segment: Segment, values: NDArray[np.float64]) -> Iterator[Turn]:
    """values: of the segment's trained tokens"""
    start = 0
    for turn in segment.turns:
        mask = turn.action.mask
        aligned: Float32 = np.zeros(len(mask), dtype=np.float32)
        aligned[mask] = values[start : start + mask.sum()]
        start += mask.sum()
        yield replace(turn, computed={**turn.computed, REFERENCE: aligned})
