"""The training engine on a transformers causal LM: one rank of a data-parallel trainer.

Float32 master weights, compute in float32 or bfloat16 (autocast). Sequences are sorted by length and padded on the right
(causal attention never looks there), in micro-batches by token budget; only positions that carry loss go through the
language model head. Gradients and denominators are summed over micro-batches and ranks and divided once (`algorithms.contract`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Algorithm, TokenBatch
from actors.episodes import Group, Sampling, Segment
from actors.trainer.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
MASKED = -1e9  # finite: a masked logit must not make 0 * inf in the backward pass


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One segment as the model reads it.

    tokens: int64 [length]    positions: int64 [trained], places in `tokens` of the tokens that carry loss
    logprobs: float32 [trained], the sampler's
    """

    tokens: np.ndarray
    positions: np.ndarray
    logprobs: np.ndarray
    advantage: float
    weight: float
    sampling: Sampling


class HFTrainingEngine:
    """`TrainingEngine` of actors.backends.contract.

    process_group: of all ranks, or None for one    publish_dtype: of what `weights` gives
    """

    def __init__(
        self,
        model: Any,
        *,
        algorithm: Algorithm,
        algorithm_config: AlgorithmConfig,
        config: TrainerConfig,
        device: str | torch.device = "cpu",
        process_group: dist.ProcessGroup | None = None,
        publish_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model.to(device)
        self.device = torch.device(device)
        self._algorithm = algorithm
        self._algorithm_config = algorithm_config
        self._config = config
        self._group = process_group
        self._publish_dtype = publish_dtype
        self._host = torch.device("cpu")
        self.model.train()
        self.model.requires_grad_(True)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._parameters = dict(self.model.named_parameters())  # tied ones once
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._steps = 0
        self._offloaded = False
        self._sums: dict[str, float] = {}

    # The step.

    def begin_step(self) -> None:
        """Forget gradients and sums."""
        self._optimizer.zero_grad(set_to_none=True)
        # The same names on every rank, also on one that gets no group.
        names = ("denominator", "tokens", "loss", *self._algorithm.METRICS)
        self._sums = dict.fromkeys(names, 0.0)

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Forward and backward over complete groups."""
        sequences = [s for group in groups for s in self._sequences(group)]
        lengths = torch.tensor([len(s.positions) for s in sequences])
        self._sums["denominator"] += self._algorithm.denominator(lengths, self._algorithm_config)
        self._sums["tokens"] += float(lengths.sum())
        trained = [s for s in sequences if len(s.positions)]
        for batch in _micro_batches(trained, self._config.micro_batch_tokens):
            self._backward(batch)

    def finish_step(self) -> dict[str, float]:
        """Reduce, divide, clip, update; metrics are means over the step's tokens and equal on all ranks."""
        names = sorted(self._sums)
        totals = torch.tensor([self._sums[name] for name in names], dtype=torch.float64)
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._group is not None:
            totals = totals.to(self._reduce_device())
            dist.all_reduce(totals, group=self._group)
            self._reduce(gradients)
        sums = dict(zip(names, totals.tolist(), strict=True))
        torch._foreach_div_(gradients, max(sums["denominator"], 1.0))
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm)
        warmup = self._config.lr_warmup_steps
        rate = self._config.learning_rate * min(1.0, (self._steps + 1) / max(warmup, 1))
        for parameter_group in self._optimizer.param_groups:
            parameter_group["lr"] = rate
        grad_norm = float(norm)
        if np.isfinite(grad_norm):  # weights stay whole; the guards end the job
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        tokens = max(sums["tokens"], 1.0)
        metrics = {
            name: round(value / tokens, 8)
            for name, value in sums.items()
            if name not in ("denominator", "tokens", "loss")
        }
        metrics["loss"] = sums["loss"] / max(sums["denominator"], 1.0)
        metrics["grad_norm"] = grad_norm
        metrics["learning_rate"] = rate
        metrics["tokens_trained"] = sums["tokens"]
        return metrics

    # Weights and state.

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters under their Hugging Face names, in the dtype that is published."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().to(self._publish_dtype or parameter.dtype)

    def state(self) -> dict[str, Tensor]:
        """Parameters "model.*", moments "exp_avg.*" and "exp_avg_sq.*", and the counter "steps"; host copies."""
        state = {"steps": torch.tensor(self._steps)}
        for name, parameter in self._parameters.items():
            state[f"model.{name}"] = parameter.detach().to("cpu", copy=True)
            moments = self._optimizer.state.get(parameter, {})
            for moment in MOMENTS:
                if moment in moments:
                    state[f"{moment}.{name}"] = moments[moment].detach().to("cpu", copy=True)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`. Raises ValueError naming what is missing or has another shape."""
        wrong = [
            name
            for name, parameter in self._parameters.items()
            if (found := state.get(f"model.{name}")) is None or found.shape != parameter.shape
        ]
        if wrong:
            raise ValueError(
                f"the state does not fit the model: {', '.join(wrong[:3])} missing or of another shape; "
                "[model] must be that of the run"
            )
        self._steps = int(state["steps"])
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"model.{name}"])
                if f"{MOMENTS[0]}.{name}" not in state:
                    self._optimizer.state.pop(parameter, None)
                    continue
                moments: dict[str, Tensor] = {
                    # The fused kernel wants its counter beside the parameter.
                    "step": torch.tensor(float(self._steps), device=parameter.device)
                }
                for moment in MOMENTS:
                    saved = state[f"{moment}.{name}"]
                    moments[moment] = saved.to(parameter.device, copy=True)
                self._optimizer.state[parameter] = moments

    def offload(self) -> None:
        """Weights and moments to the host; between two steps only."""
        self._move(self._host)
        self._offloaded = True

    def onload(self) -> None:
        """Weights and moments to the device."""
        self._move(self.device)
        self._offloaded = False

    def memory_bytes(self) -> int:
        """Weights, gradients and moments that are on the device now."""
        if self._offloaded:
            return 0
        held: list[Tensor] = list(self._parameters.values())
        held += [p.grad for p in self._parameters.values() if p.grad is not None]
        held += [
            tensor
            for moments in self._optimizer.state.values()
            for tensor in moments.values()
            if isinstance(tensor, Tensor)
        ]
        return sum(tensor.nbytes for tensor in held)

    def _move(self, device: torch.device) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters.values():
            parameter.data = parameter.data.to(device)
            moments = self._optimizer.state.get(parameter, {})
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    moments[key] = value.to(device)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Below: how.

    def _sequences(self, group: Group) -> list[_Sequence]:
        rewards = torch.tensor(group.rewards, dtype=torch.float32)
        advantages = self._algorithm.advantages(rewards, self._algorithm_config).tolist()
        parts = [_layout(segment) for segment in group.segments]
        lengths = torch.tensor([len(positions) for _, positions, _ in parts])
        weights = self._algorithm.weights(lengths, self._algorithm_config).tolist()
        return [
            _Sequence(
                tokens, positions, logprobs, advantage, weight, segment.turns[-1].action.sampling
            )
            for segment, (tokens, positions, logprobs), advantage, weight in zip(
                group.segments, parts, advantages, weights, strict=True
            )
        ]

    def _backward(self, batch: list[_Sequence]) -> None:
        longest = max(len(s.tokens) for s in batch)
        tokens = np.zeros((len(batch), longest), dtype=np.int64)
        for row, sequence in enumerate(batch):
            tokens[row, : len(sequence.tokens)] = sequence.tokens
        counts = [len(s.positions) for s in batch]
        rows = torch.from_numpy(np.repeat(np.arange(len(batch)), counts)).to(self.device)
        columns = torch.from_numpy(np.concatenate([s.positions for s in batch])).to(self.device)
        inputs = torch.from_numpy(tokens).to(self.device)
        bfloat16 = self._config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            base = self.model.get_decoder()
            hidden = base(input_ids=inputs, use_cache=False).last_hidden_state
            # The logits at a place predict the token after it.
            logits = self.model.get_output_embeddings()(hidden[rows, columns - 1])
        targets = inputs[rows, columns]
        logits = _sampled_from(logits.to(self._master_dtype()), targets, batch, counts)
        log_probabilities = logits.log_softmax(-1)
        logprobs = log_probabilities.gather(1, targets[:, None])[:, 0]
        entropy = None
        if self._algorithm_config.entropy_coefficient:
            entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        device, dtype = logprobs.device, logprobs.dtype
        loss, sums = self._algorithm.loss(
            TokenBatch(
                logprobs=logprobs,
                behaviour_logprobs=torch.from_numpy(np.concatenate([s.logprobs for s in batch])).to(
                    device, dtype
                ),
                advantages=_per_token([s.advantage for s in batch], counts).to(device, dtype),
                weights=_per_token([s.weight for s in batch], counts).to(device, dtype),
                entropy=entropy,
            ),
            self._algorithm_config,
        )
        loss.backward()
        self._sums["loss"] += float(loss.detach())
        for name, value in sums.items():
            self._sums[name] += float(value)

    def _master_dtype(self) -> torch.dtype:
        return next(iter(self._parameters.values())).dtype

    def _reduce_device(self) -> torch.device:
        assert self._group is not None
        return self.device if dist.get_backend(self._group) == "nccl" else self._host

    def _reduce(self, gradients: list[Tensor]) -> None:
        """Sum the gradients over the ranks, flattened into one tensor."""
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        reduced = flat.to(self._reduce_device())
        dist.all_reduce(reduced, group=self._group)
        flat = reduced.to(self.device)
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def _layout(segment: Segment) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of the whole context, places of the trained ones in it, and the sampler's log-probs of those."""
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    logprobs: list[np.ndarray] = []
    length = 0
    for turn in segment.turns:
        action = turn.action
        start = length + len(action.prompt)
        kept = np.flatnonzero(action.mask)
        tokens += [action.prompt, action.tokens]
        positions.append(start + kept)
        logprobs.append(action.logprobs[kept])
        length = start + len(action.tokens)
    return (
        np.concatenate(tokens).astype(np.int64),
        np.concatenate(positions).astype(np.int64),
        np.concatenate(logprobs).astype(np.float32),
    )


def _micro_batches(sequences: list[_Sequence], budget: int) -> Iterator[list[_Sequence]]:
    """Cut sequences, shortest first, so that a padded micro-batch has at most `budget` tokens."""
    batch: list[_Sequence] = []
    for sequence in sorted(sequences, key=lambda s: len(s.tokens)):
        if batch and len(sequence.tokens) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _per_token(values: list[float], counts: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.tensor(values), torch.tensor(counts))


def _sampled_from(
    logits: Tensor, targets: Tensor, batch: list[_Sequence], counts: list[int]
) -> Tensor:
    """Logits [tokens, vocab] of the distribution that was sampled from: temperature, window, top-k.

    The sampled token always stays in the top-k: it was in the sampler's.
    """
    # A greedy action (temperature 0) has the log-probs of temperature 1.
    temperatures = [s.sampling.temperature or 1.0 for s in batch]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / _per_token(temperatures, counts).to(logits)[:, None]
    first = batch[0].sampling
    if first.vocabulary is not None:
        low, high = first.vocabulary
        outside = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        outside[low:high] = False
        logits = logits.masked_fill(outside, MASKED)
    if first.top_k:
        kth = logits.topk(min(first.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        below = (logits < kth).scatter(1, targets[:, None], False)
        logits = logits.masked_fill(below, MASKED)
    return logits
