"""The training engine on a transformers causal LM: one rank of a data-parallel trainer.

Float32 master weights and AdamW, compute in float32 or bfloat16 (autocast). Sequences are padded into micro-batches by
token budget; gradients, metrics and the denominator are summed over micro-batches and ranks, and divided once.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors.algorithms import disagreement
from actors.algorithms.config import PAPERS, AlgorithmConfig, resolve, scope
from actors.algorithms.contract import Algorithm, TokenBatch
from actors.algorithms.estimates import normalize_by_batch
from actors.backends.critic import Critic
from actors.backends.token_logprobs import TokenLogprobs
from actors.backends.training_batches import (
    GroupsLaidOut,
    TrainingSequence,
    lay_out,
    micro_batches,
    set_targets,
    turn_numbers,
)
from actors.episodes import Group
from actors.trainer.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 1 << 24  # of gradients reduced at a time: 64 MiB in float32
HOST = torch.device("cpu")


class HFTrainingEngine:
    """`TrainingEngine` of actors.backends.contract. Moves `model` to `device` and from then on owns it.

    Its parameters are the master weights: float32 (float64 works too, for tests). Dropout stays off, so that log-probs
    are those of the policy that sampled. The critic of an algorithm that has one is trained beside it, and a reference
    policy, where one is asked for, is what the weights were before the first step.

    process_group: of all ranks, or None for one
    keep_reference: False where groups bring the reference's log-probs, see actors.inference
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
        keep_reference: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(True)
        self._algorithm = algorithm
        self._algorithm_config = settings = resolve(algorithm_config)
        self._config = config
        self._group = process_group
        if config.gradient_checkpointing:
            _checkpoint_layers(self.model)
        self._published = dict(self.model.named_parameters())  # tied ones once
        self._parameters = dict(self._published)
        self._critic: Critic | None = None
        if PAPERS[settings.name].critic:
            self._critic = Critic(self.model, own_trunk=settings.critic == "model")
            self._parameters |= {
                f"critic.{name}": parameter for name, parameter in self._critic.named_parameters()
            }
        self._dtype = next(iter(self._parameters.values())).dtype
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._logprobs = TokenLogprobs(self.model)
        self._reference: Any = None
        self._needs_reference = keep_reference and settings.kl_coefficient > 0
        self._several_updates = settings.epochs * settings.mini_batches > 1
        # Until the whole step is there: its mean and deviation, or how to cut it into updates, are not known before.
        self._waits = self._several_updates or scope(settings) == "batch"
        self._held: list[GroupsLaidOut] = []
        self._steps = 0
        self._resident = True
        self._host_copies: dict[int, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._ratios = torch.zeros(disagreement.BUCKETS, dtype=torch.float64, device=self.device)

    # The step.

    def begin_step(self) -> None:
        """Forget gradients, sums, and groups that wait."""
        if self._needs_reference and self._reference is None:
            self._reference = _frozen_copy(self.model)
        self._optimizer.zero_grad(set_to_none=True)
        self._held = []
        self._ratios.zero_()
        self._sums = self._no_sums()

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Forward and backward over complete groups; where the algorithm's scope is the whole batch, or a step is
        several updates, forward only, for what advantages are computed from."""
        laid_out = lay_out(groups)
        if self._algorithm_config.kl_coefficient and not self._needs_reference:
            assert all(s.reference is not None for s in laid_out.sequences), "no inference actor"
        self._read_before_update(laid_out.sequences)
        set_targets(
            laid_out,
            self._algorithm,
            self._algorithm_config,
            critic=self._critic is not None,
        )
        if self._waits:
            self._held.append(laid_out)
        else:
            self._train(laid_out.sequences, float(laid_out.denominators.sum()))

    def finish_step(self) -> dict[str, float]:
        """Reduce, divide, clip, update. Returns "loss", "grad_norm", "learning_rate", "tokens_trained", the algorithm's
        metrics and those of `disagreement` as means over the trained tokens, and quantiles of the policy ratio.

        Several updates: their mean loss and their largest gradient norm. Where loss or gradient is not finite the
        weights stay as they are, and the metrics show it. They also stay in an update without any trained token.
        """
        rise = min(1.0, (self._steps + 1) / max(self._config.lr_warmup_steps, 1))
        learning_rate = self._config.learning_rate * rise
        for parameter_group in self._optimizer.param_groups:
            parameter_group["lr"] = learning_rate
        if scope(self._algorithm_config) == "batch":
            self._normalize_by_batch()
        losses: list[float] = []
        norms: list[float] = []
        totals: dict[str, float] = {}
        for part in self._updates():
            if part is not None:
                self._sums = self._no_sums()
                self._train(*part)
            sums, loss, grad_norm = self._update()
            losses.append(loss)
            norms.append(grad_norm)
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
            if not np.isfinite((loss, grad_norm)).all():
                break
        self._held = []
        self._steps += 1
        histogram = self._ratios.clone()
        if self._group is not None:
            self._all_reduce(histogram)
        tokens = totals.pop("tokens")
        return {
            **{name: value / max(tokens, 1.0) for name, value in totals.items()},
            **disagreement.quantiles(histogram),
            "loss": sum(losses) / len(losses),
            "grad_norm": float(np.max(norms)),
            "learning_rate": learning_rate,
            "tokens_trained": tokens,
        }

    def _updates(self) -> Iterator[tuple[list[TrainingSequence], float] | None]:
        """What each update of the step is trained on, with its denominator; None: gradients are there already."""
        if not self._waits:
            yield None
            return
        settings = self._algorithm_config
        for _ in range(settings.epochs):
            for part in range(settings.mini_batches):
                # By the group's number in the job: the same whatever rank has it, in whatever order they came.
                chosen = [
                    (
                        laid_out,
                        [number % settings.mini_batches == part for number in laid_out.numbers],
                    )
                    for laid_out in self._held
                ]
                sequences = [
                    sequence
                    for laid_out, _ in chosen
                    for sequence in laid_out.sequences
                    if sequence.group % settings.mini_batches == part
                ]
                denominator = sum(laid_out.denominators[among].sum() for laid_out, among in chosen)
                yield sequences, float(denominator)

    def _update(self) -> tuple[dict[str, float], float, float]:
        """Reduce sums and gradients, divide, clip and step the optimizer. Returns sums, loss and gradient norm."""
        names = sorted(self._sums)
        totals = torch.stack([self._sums[name] for name in names])
        gradients = []
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._group is not None:
            self._all_reduce(totals)
            for bucket in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                self._all_reduce(flat)
                pieces = flat.split([gradient.numel() for gradient in bucket])
                for gradient, piece in zip(bucket, pieces, strict=True):
                    gradient.copy_(piece.view_as(gradient))
        sums = dict(zip(names, totals.tolist(), strict=True))
        denominator = sums.pop("denominator")
        loss = sums.pop("loss") / max(denominator, 1.0)
        torch._foreach_div_(gradients, max(denominator, 1.0))
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm)
        )
        if np.isfinite((loss, grad_norm)).all() and sums["tokens"]:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return sums, loss, grad_norm

    def _normalize_by_batch(self) -> None:
        """By mean and deviation over the trained tokens of all ranks; in two passes, so that nothing cancels out."""
        sequences = [sequence for laid_out in self._held for sequence in laid_out.sequences]
        advantages = torch.cat(
            [torch.zeros(0, dtype=torch.float64)]
            + [torch.from_numpy(sequence.advantages) for sequence in sequences]
        )
        moments = torch.stack([torch.tensor(float(len(advantages))).double(), advantages.sum()])
        if self._group is not None:
            moments = self._all_reduced(moments)
        count, total = moments.tolist()
        mean = total / max(count, 1.0)
        squares = (advantages - mean).square().sum()
        if self._group is not None:
            squares = self._all_reduced(squares)
        std = float(squares / max(count, 1.0)) ** 0.5
        normalized = normalize_by_batch(advantages, mean, std).split(
            [len(sequence.advantages) for sequence in sequences]
        )
        for sequence, values in zip(sequences, normalized, strict=False):
            sequence.advantages = values.numpy()

    @torch.no_grad()
    def _read_before_update(self, sequences: list[TrainingSequence]) -> None:
        """Values, reference and proximal log-probs, as far as they are asked for."""
        proximal = self._several_updates and self._algorithm_config.proximal == "recomputed"
        if not (self._needs_reference or self._critic is not None or proximal):
            return
        for batch in micro_batches(sequences, self._config.micro_batch_tokens):
            inputs = _Inputs(batch, self.device)
            if self._needs_reference:
                logprobs, _ = self._read(self._reference_logprobs(), inputs)
                for sequence, values in inputs.by_sequence(logprobs):
                    sequence.reference = values
            shared = self._critic is not None and self._critic.trunk is None
            if proximal or shared:
                logprobs, _ = self._read(self._logprobs, inputs)
                if proximal:
                    for sequence, values in inputs.by_sequence(logprobs):
                        sequence.proximal = values
            if self._critic is not None:
                before, after = self._read_values(inputs)
                for sequence, values in inputs.by_sequence(before):
                    sequence.values = values
                for sequence, value in zip(batch, after.tolist(), strict=True):
                    sequence.last_value = value

    def _reference_logprobs(self) -> TokenLogprobs:
        return TokenLogprobs(self._reference, plain_head=self._logprobs.plain_head)

    def _train(self, sequences: list[TrainingSequence], denominator: float) -> None:
        """Add the gradients and sums of these sequences to those of the update."""
        self._sums["denominator"] += denominator
        self._sums["tokens"] += sum(len(sequence.positions) for sequence in sequences)
        for batch in micro_batches(sequences, self._config.micro_batch_tokens):
            self._backward(batch)

    def _backward(self, batch: list[TrainingSequence]) -> None:
        inputs = _Inputs(batch, self.device)

        def per_token(arrays: list[Any]) -> Tensor | None:
            if any(array is None for array in arrays):
                return None
            return torch.from_numpy(np.concatenate(arrays)).to(self.device, self._dtype)

        logprobs, entropy = self._read(self._logprobs, inputs)
        values = self._read_values(inputs)[0] if self._critic is not None else None
        if not self._algorithm_config.entropy_coefficient:
            entropy = entropy.detach()
        behaviour = per_token([s.logprobs for s in batch])
        staleness = per_token([np.maximum(self._steps - s.versions, 0) for s in batch])
        advantages = per_token([s.advantages for s in batch])
        weights = per_token([s.weights for s in batch])
        assert behaviour is not None
        assert staleness is not None
        assert advantages is not None
        assert weights is not None
        loss, sums = self._algorithm.loss(
            TokenBatch(
                logprobs=logprobs,
                behaviour_logprobs=behaviour,
                advantages=advantages,
                weights=weights,
                entropy=entropy,
                sequences=inputs.rows,
                turns=turn_numbers(batch).to(self.device),
                staleness=staleness,
                proximal_logprobs=per_token([s.proximal for s in batch]),
                reference_logprobs=per_token([s.reference for s in batch]),
                values=values,
                old_values=per_token([s.values for s in batch]),
                returns=per_token([s.returns for s in batch]),
            ),
            self._algorithm_config,
        )
        loss.backward()
        self._sums["loss"] += loss.detach()
        apart, histogram = disagreement.measure(logprobs, behaviour)
        self._ratios += histogram
        for name, value in {**sums, **apart}.items():
            self._sums[name] += value

    def _read(self, logprobs: TokenLogprobs, inputs: "_Inputs") -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the trained tokens."""
        critic = self._critic
        shared = critic is not None and critic.trunk is None
        with self._autocast(), critic.watching(self.model) if critic and shared else nullcontext():
            return logprobs(
                inputs.tokens, inputs.rows, inputs.columns, inputs.sampling, self._dtype
            )

    def _read_values(self, inputs: "_Inputs") -> tuple[Tensor, Tensor]:
        """The critic's, before the trained tokens and at the ends; after `_read` of the same inputs."""
        assert self._critic is not None
        with self._autocast():
            before, after = self._critic(inputs.tokens, inputs.rows, inputs.columns, inputs.lengths)
        return before, after

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._config.dtype == "bfloat16"
        )

    def _no_sums(self) -> dict[str, Tensor]:
        # The same names on every rank, also on one that gets no group.
        names = (
            "denominator",
            "tokens",
            "loss",
            *self._algorithm.METRICS,
            *disagreement.METRICS,
        )
        return {name: self._zero() for name in names}

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _all_reduce(self, tensor: Tensor) -> None:
        """Sum over the ranks in place; by way of the host where the group cannot reach the device."""
        if dist.get_backend(self._group) == "nccl" or tensor.device.type == "cpu":
            dist.all_reduce(tensor, group=self._group)
            return
        on_host = tensor.cpu()
        dist.all_reduce(on_host, group=self._group)
        tensor.copy_(on_host)

    def _all_reduced(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of a tensor on the host, there again; by way of the device where that talks."""
        moved = tensor.to(self.device)
        self._all_reduce(moved)
        return moved.cpu()

    # Weights and state.

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters under their Hugging Face names, tied ones once: the masters themselves."""
        for name, parameter in self._published.items():
            yield name, parameter.detach()

    def state(self) -> dict[str, Tensor]:
        """Parameters "model.*" (the critic's "model.critic.*"), moments "exp_avg.*" and "exp_avg_sq.*", the counters
        "steps" (of the schedule) and "updates" (of the optimizer), "reference.*" where there is one; not copies."""
        state = {"steps": torch.tensor(self._steps), "updates": torch.tensor(0)}
        for name, parameter in self._parameters.items():
            state[f"model.{name}"] = parameter.detach()
            moments = self._optimizer.state.get(parameter)
            if moments:
                state["updates"] = torch.tensor(int(moments["step"]))
                for moment in MOMENTS:
                    state[f"{moment}.{name}"] = moments[moment].detach()
        if self._reference is not None:
            for name, parameter in self._reference.named_parameters():
                state[f"reference.{name}"] = parameter.detach()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`. Raises ValueError naming what is missing or has another shape; nothing is changed then.

        A state from before the first step has no reference: its own weights are the reference.
        """
        prefixes = ("model", *MOMENTS) if int(state.get("updates", torch.tensor(0))) else ("model",)
        wrong = [name for name in ("steps", "updates") if name not in state]
        wrong += [
            f"{prefix}.{name}"
            for name, parameter in self._parameters.items()
            for prefix in prefixes
            if (found := state.get(f"{prefix}.{name}")) is None or found.shape != parameter.shape
        ]
        if self._needs_reference and int(state.get("steps", torch.tensor(0))):
            wrong += [
                f"reference.{name}" for name in self._published if f"reference.{name}" not in state
            ]
        if wrong:
            raise ValueError(
                f"the state does not fit the model: {', '.join(wrong[:3])} missing or of another shape"
                f"{f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; [model] must be that of the run"
            )
        self._steps = int(state["steps"])
        self._optimizer.state.clear()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"model.{name}"])
                if len(prefixes) == 1:
                    continue
                moments = {  # the fused kernel wants its counter beside the parameter
                    "step": torch.tensor(float(state["updates"]), device=parameter.device)
                }
                for moment in MOMENTS:
                    saved = state[f"{moment}.{name}"]
                    moments[moment] = saved.to(parameter.device, parameter.dtype, copy=True)
                self._optimizer.state[parameter] = moments
            self._reference = None
            if self._needs_reference:
                self._reference = _frozen_copy(self.model)
                for name, parameter in self._reference.named_parameters():
                    parameter.copy_(state.get(f"reference.{name}", state[f"model.{name}"]))

    # The device.

    def offload(self) -> None:
        """Weights and moments to the host, between two steps. On CPU they stay: device and host are one."""
        self._optimizer.zero_grad(set_to_none=True)
        self._sums, self._held = {}, []
        if self.device.type != "cpu" and self._resident:
            self._move_to_host()
        self._resident = False

    def onload(self) -> None:
        """Weights and moments to the device, as they were."""
        if self.device.type != "cpu" and not self._resident:
            for tensor in self._tensors():
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            torch.cuda.synchronize(self.device)
        self._resident = True

    def memory_bytes(self) -> int:
        """Device memory held now: weights, reference, gradients and moments (not activations)."""
        if not self._resident:
            return 0
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return sum(tensor.nbytes for tensor in (*self._tensors(), *gradients))

    def _tensors(self) -> list[Tensor]:
        """Parameters, buffers, the reference and what the optimizer keeps, each once."""
        moments = [
            value
            for kept in self._optimizer.state.values()
            for value in kept.values()
            if isinstance(value, Tensor)
        ]
        frozen = [self._reference] if self._reference is not None else []
        own_trunk = [self._critic] if self._critic is not None else []
        return [
            *self._parameters.values(),
            *(buffer for each in (self.model, *own_trunk, *frozen) for buffer in each.buffers()),
            *(parameter for each in frozen for parameter in each.parameters()),
            *moments,
        ]

    def _move_to_host(self) -> None:
        held = self._tensors()
        for place, tensor in enumerate(held):
            # Pinned memory is slow to make and several times faster to copy from, so it is kept for the next time.
            copy = self._host_copies.get(place)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                self._host_copies[place] = copy
            copy.copy_(tensor.data, non_blocking=True)
        torch.cuda.synchronize(self.device)
        for place, tensor in enumerate(held):
            tensor.data = self._host_copies[place]
        torch.cuda.empty_cache()


class _Inputs:
    """What the model reads of a micro-batch.

    tokens: int64 [batch, time], padded on the right    lengths: int64 [batch]
    rows, columns: int64 [trained], places of the trained tokens
    """

    def __init__(self, batch: list[TrainingSequence], device: torch.device) -> None:
        self.sampling = batch[0].sampling
        self._batch = batch
        self._counts = [len(s.positions) for s in batch]
        lengths = [len(s.tokens) for s in batch]
        tokens = np.zeros((len(batch), max(lengths)), dtype=np.int64)
        for row, sequence in enumerate(batch):
            tokens[row, : lengths[row]] = sequence.tokens
        self.tokens = torch.from_numpy(tokens).to(device)
        self.lengths = torch.tensor(lengths, device=device)
        self.rows = torch.from_numpy(np.repeat(np.arange(len(batch)), self._counts)).to(device)
        self.columns = torch.from_numpy(np.concatenate([s.positions for s in batch])).to(device)

    def by_sequence(
        self, values: Tensor
    ) -> Iterator[tuple[TrainingSequence, np.ndarray[Any, np.dtype[np.float64]]]]:
        """Cut what was read for the trained tokens [trained] into that of each sequence, on the host."""
        pieces = np.split(values.double().cpu().numpy(), np.cumsum(self._counts)[:-1])
        return zip(self._batch, pieces, strict=True)


def _frozen_copy(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours whose elements together are about BUCKET_ELEMENTS: few collectives, little extra memory."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= BUCKET_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _checkpoint_layers(model: Any) -> None:
    """Compute activations of the blocks again in the backward pass, with dropout off all the same.

    transformers' blocks do so only while they themselves, not what is in them, are in training mode.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
