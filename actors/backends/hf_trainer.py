"""The training engine on a transformers causal LM: one rank of a data-parallel trainer.

Float32 master weights and AdamW, compute in float32 or bfloat16 (autocast). Sequences are padded into micro-batches by
token budget; gradients, metrics and the denominator are summed over micro-batches and ranks, and divided once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Algorithm, TokenBatch
from actors.backends.token_logprobs import TokenLogprobs
from actors.backends.training_batches import TrainingSequence, group_sequences, micro_batches
from actors.episodes import Group
from actors.trainer.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 1 << 24  # of gradients reduced at a time: 64 MiB in float32
HOST = torch.device("cpu")


class HFTrainingEngine:
    """`TrainingEngine` of actors.backends.contract. Moves `model` to `device` and from then on owns it.

    Its parameters are the master weights: float32 (float64 works too, for tests). Dropout stays off, so that log-probs
    are those of the policy that sampled.

    process_group: of all ranks, or None for one    publish_dtype: of what `weights` gives; None is the master's
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
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(True)
        self._algorithm = algorithm
        self._algorithm_config = algorithm_config
        self._config = config
        self._group = process_group
        self._publish_dtype = publish_dtype
        if config.gradient_checkpointing:
            _checkpoint_layers(self.model)
        self._parameters = dict(self.model.named_parameters())  # tied ones once
        self._dtype = next(iter(self._parameters.values())).dtype
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._logprobs = TokenLogprobs(self.model)
        self._steps = 0
        self._resident = True
        self._host_copies: dict[int, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    # The step.

    def begin_step(self) -> None:
        """Forget gradients and sums."""
        self._optimizer.zero_grad(set_to_none=True)
        # The same names on every rank, also on one that gets no group.
        names = ("denominator", "tokens", "loss", *self._algorithm.METRICS)
        self._sums = {name: self._zero() for name in names}

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Forward and backward over complete groups."""
        laid_out = [group_sequences(g, self._algorithm, self._algorithm_config) for g in groups]
        self._sums["denominator"] += sum(group.denominator for group in laid_out)
        self._sums["tokens"] += sum(group.num_tokens for group in laid_out)
        sequences = [sequence for group in laid_out for sequence in group.sequences]
        for batch in micro_batches(sequences, self._config.micro_batch_tokens):
            self._backward(batch)

    def finish_step(self) -> dict[str, float]:
        """Reduce, divide, clip, update. Returns "loss", "grad_norm", "learning_rate", "tokens_trained", and the
        algorithm's metrics as means over the step's tokens.

        Where loss or gradient is not finite the weights stay as they are, and the metrics show it. They also stay
        in a step without any trained token.
        """
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
        denominator, tokens = sums.pop("denominator"), sums.pop("tokens")
        loss = sums.pop("loss") / max(denominator, 1.0)
        torch._foreach_div_(gradients, max(denominator, 1.0))
        grad_norm = float(
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._config.max_grad_norm)
        )
        rise = min(1.0, (self._steps + 1) / max(self._config.lr_warmup_steps, 1))
        learning_rate = self._config.learning_rate * rise
        for parameter_group in self._optimizer.param_groups:
            parameter_group["lr"] = learning_rate
        if np.isfinite((loss, grad_norm)).all() and tokens:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return {
            **{name: value / max(tokens, 1.0) for name, value in sums.items()},
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens_trained": tokens,
        }

    def _backward(self, batch: list[TrainingSequence]) -> None:
        tokens = np.zeros((len(batch), max(len(s.tokens) for s in batch)), dtype=np.int64)
        for row, sequence in enumerate(batch):
            tokens[row, : len(sequence.tokens)] = sequence.tokens
        counts = [len(s.positions) for s in batch]

        def per_token(values: list[float]) -> Tensor:
            return torch.from_numpy(np.repeat(values, counts)).to(self.device, self._dtype)

        rows = torch.from_numpy(np.repeat(np.arange(len(batch)), counts)).to(self.device)
        columns = torch.from_numpy(np.concatenate([s.positions for s in batch])).to(self.device)
        inputs = torch.from_numpy(tokens).to(self.device)
        bfloat16 = self._config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            logprobs, entropy = self._logprobs(
                inputs, rows, columns, batch[0].sampling, self._dtype
            )
        if not self._algorithm_config.entropy_coefficient:
            entropy = entropy.detach()
        behaviour = torch.from_numpy(np.concatenate([s.logprobs for s in batch]))
        loss, sums = self._algorithm.loss(
            TokenBatch(
                logprobs=logprobs,
                behaviour_logprobs=behaviour.to(self.device, self._dtype),
                advantages=per_token([s.advantage for s in batch]),
                weights=per_token([s.weight for s in batch]),
                entropy=entropy,
            ),
            self._algorithm_config,
        )
        loss.backward()
        self._sums["loss"] += loss.detach()
        for name, value in sums.items():
            self._sums[name] += value

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

    # Weights and state.

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters under their Hugging Face names, tied ones once, in the dtype that is published."""
        for name, parameter in self._parameters.items():
            yield name, parameter.detach().to(self._publish_dtype or parameter.dtype)

    def state(self) -> dict[str, Tensor]:
        """Parameters "model.*", moments "exp_avg.*" and "exp_avg_sq.*", the counters "steps" (of the schedule) and
        "updates" (of the optimizer); host copies."""
        state = {"steps": torch.tensor(self._steps), "updates": torch.tensor(0)}
        for name, parameter in self._parameters.items():
            state[f"model.{name}"] = parameter.detach().to(HOST, copy=True)
            moments = self._optimizer.state.get(parameter)
            if moments:
                state["updates"] = torch.tensor(int(moments["step"]))
                for moment in MOMENTS:
                    state[f"{moment}.{name}"] = moments[moment].detach().to(HOST, copy=True)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`. Raises ValueError naming what is missing or has another shape; nothing is changed then."""
        prefixes = ("model", *MOMENTS) if int(state.get("updates", torch.tensor(0))) else ("model",)
        wrong = [name for name in ("steps", "updates") if name not in state]
        wrong += [
            f"{prefix}.{name}"
            for name, parameter in self._parameters.items()
            for prefix in prefixes
            if (found := state.get(f"{prefix}.{name}")) is None or found.shape != parameter.shape
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

    # The device.

    def offload(self) -> None:
        """Weights and moments to the host, between two steps. On CPU they stay: device and host are one."""
        self._optimizer.zero_grad(set_to_none=True)
        self._sums = {}
        if self.device.type != "cpu" and self._resident:
            self._move_to_host()
        self._resident = False

    def onload(self) -> None:
        """Weights and moments to the device, as they were."""
        if self.device.type != "cpu" and not self._resident:
            for tensor in self._held():
                tensor.data = tensor.data.to(self.device, non_blocking=True)
            torch.cuda.synchronize(self.device)
        self._resident = True

    def memory_bytes(self) -> int:
        """Device memory held now: weights, gradients and moments (not activations)."""
        if not self._resident:
            return 0
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return sum(tensor.nbytes for tensor in (*self._held(), *gradients))

    def _held(self) -> list[Tensor]:
        """Parameters, buffers and what the optimizer keeps, each once."""
        moments = [
            value
            for kept in self._optimizer.state.values()
            for value in kept.values()
            if isinstance(value, Tensor)
        ]
        return [*self._parameters.values(), *self.model.buffers(), *moments]

    def _move_to_host(self) -> None:
        held = self._held()
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
