"""Log-probs of a simulator's actions again, with gradient: how a training engine reads a policy that acts on arrays."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.backends.ranks import Ranks
from actors.backends.reading import Reader, Readings
from actors.backends.training_batches import Float64, GroupsLaidOut, TrainingSequence
from actors.models.action_policy import ActionPolicy, Observations
from actors.models.arrays import stack
from actors.models.config import PolicyConfig


class ArrayBatch:
    """What the policy reads of a micro-batch: every turn of its sequences is a row.

    observations: [turns, ...] by name    recompute: [turns, ...], see `actors.models.action_policy`
    units: int64 [trained], places of the trained units in [turns * units of a turn]
    turns: int64 [trained], their rows    rows: int64 [trained], whose sequence each is of
    last: observations after the sequences' last turns, where they were cut off    cut: int64, which sequences those are
    """

    def __init__(
        self, batch: list[TrainingSequence], config: PolicyConfig, device: torch.device
    ) -> None:
        self._batch = batch
        self._counts = [len(s.positions) for s in batch]
        turns = [turn for s in batch for turn in s.segment.turns]
        self.observations = stack([turn.observation for turn in turns], config, device)
        actions = [turn.action for turn in turns]
        self.recompute = {
            name: torch.from_numpy(np.stack([a.recompute[name] for a in actions])).to(device)
            for name in actions[0].recompute
        }
        if len(actions[0].tokens):
            tokens = np.stack([action.tokens for action in actions])
            self.recompute["tokens"] = torch.from_numpy(tokens).to(device)
        mask = np.stack([action.mask for action in actions])  # [turns, units]
        self.units = torch.from_numpy(np.flatnonzero(mask)).to(device)
        self.turns = self.units // mask.shape[1]
        self.rows = torch.from_numpy(np.repeat(np.arange(len(batch)), self._counts)).to(device)
        cut = [place for place, s in enumerate(batch) if s.segment.bootstrap is not None]
        self.cut = torch.tensor(cut, dtype=torch.int64, device=device)
        self.last: Observations | None = None
        if cut:
            self.last = stack([batch[place].segment.bootstrap for place in cut], config, device)

    def __len__(self) -> int:
        return len(self._batch)

    def by_sequence(self, values: Tensor) -> Iterator[tuple[TrainingSequence, Float64]]:
        """Cut what was read for the trained units [trained] into that of each sequence, on the host."""
        pieces = np.split(values.double().cpu().numpy(), np.cumsum(self._counts)[:-1])
        return zip(self._batch, pieces, strict=True)


class ActionReader(Reader):
    """The policy, read at the trained units. A turn's value is that of each of its units."""

    def __init__(self, policy: ActionPolicy, critic: str | None, config: PolicyConfig) -> None:
        """critic: None where the algorithm has none; the policy's is not trained then"""
        super().__init__()
        self.model = policy
        self._critic = critic
        self._config = config

    @property
    def has_critic(self) -> bool:
        return self._critic is not None

    def batch(self, sequences: list[TrainingSequence], device: torch.device) -> ArrayBatch:
        return ArrayBatch(sequences, self._config, device)

    def frozen_copy(self) -> "ActionReader":
        frozen = ActionReader(copy.deepcopy(self.model), None, self._config)
        return frozen.requires_grad_(False)

    def transformers(self) -> list[Any]:
        return [m for m in self.model.children() if hasattr(m, "gradient_checkpointing_enable")]

    def normalization(self, gamma: float) -> "RunningNormalization":
        return RunningNormalization(self.model, self._config, gamma)

    def forward(self, batch: ArrayBatch | None, dtype: torch.dtype | None = None) -> Any:
        if batch is None:
            return (min(self.parameters(), key=Tensor.numel) * 0).sum()
        assert dtype is not None
        read = self.model.evaluate(batch.observations, batch.recompute)
        logprobs = read.logprobs.flatten()[batch.units].to(dtype)
        entropies = read.entropy.flatten()[batch.units].to(dtype)
        if not self.has_critic:
            return Readings(logprobs, entropies, None, None)
        last_values = torch.zeros(len(batch), dtype=dtype, device=batch.rows.device)
        if batch.last is not None:
            with torch.no_grad():
                last_values[batch.cut] = self.model.value(batch.last).to(dtype)
        return Readings(logprobs, entropies, read.values[batch.turns].to(dtype), last_values)


class RunningNormalization:
    """The policy's running moments: of observations, and of the discounted returns so far, by whose deviation rewards
    are divided (Engstrom et al. 2020, arXiv:2005.12729, section 3, tell of both in implementations of PPO)."""

    def __init__(self, policy: ActionPolicy, config: PolicyConfig, gamma: float) -> None:
        self._policy = policy
        self._config = config
        self._gamma = gamma
        self._running = list(policy.observed().values())
        if policy.returns is not None:
            self._running.append(policy.returns)
        self._seen: list[Tensor] = []  # moments for each of those
        self.begin()

    def begin(self) -> None:
        self._seen = [torch.zeros_like(running.mean).repeat(2) for running in self._running]
        self._seen = [torch.cat([seen.new_zeros(1), seen]) for seen in self._seen]

    def scale(self, laid_out: GroupsLaidOut) -> None:
        sequences = laid_out.sequences
        turns = [turn for sequence in sequences for turn in sequence.segment.turns]
        if not turns or not self._running:
            return
        device = self._seen[0].device
        observations = stack([turn.observation for turn in turns], self._config, device)
        rows = list(self._policy.rows(observations).values())
        if self._policy.returns is not None:
            so_far = self._discounted(sequences)
            rows.append(torch.tensor(so_far, dtype=torch.float64, device=device)[:, None])
        for seen, running, each in zip(self._seen, self._running, rows, strict=True):
            seen += running.moments(each)
        if self._policy.returns is not None:
            std = float(self._policy.returns.std)
            for sequence in sequences:
                sequence.rewards /= std
            laid_out.returns = [earned / std for earned in laid_out.returns]

    def finish(self, ranks: Ranks) -> None:
        for seen, running in zip(self._seen, self._running, strict=True):
            running.add(ranks.sum_(seen))

    def _discounted(self, sequences: Sequence[TrainingSequence]) -> list[float]:
        """Of every turn, what the episode had earned by then, discounted."""
        found = []
        for sequence in sequences:
            so_far = 0.0
            for turn in sequence.segment.turns:
                so_far = self._gamma * so_far + turn.reward
                found.append(so_far)
        return found
