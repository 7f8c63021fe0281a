"""The training engine on a torch model, by default a transformers causal LM: one rank of a data-parallel trainer.

Float32 master weights and AdamW, compute in float32 or bfloat16. Sequences are packed into micro-batches by token
budget; gradients, metrics and the denominator are summed over micro-batches and ranks, and divided once.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors.algorithms import disagreement
from actors.algorithms.config import PAPERS, AlgorithmConfig, reads_proximal, resolve, scope
from actors.algorithms.contract import Algorithm, TokenBatch
from actors.backends import batch_statistics
from actors.backends.contract import ADAPTER, BASE
from actors.backends.host_copies import HostCopies
from actors.backends.lora import WRONG_BASE, LoraAdapter, base_checksum
from actors.backends.optimizer import MOMENTS, Optimizer
from actors.backends.ranks import Ranks
from actors.backends.reading import Reader, Readings
from actors.backends.schedule import learning_rate
from actors.backends.sharding import ShardedModule, Sharding, local, part_of
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
from actors.errors import BadCheckpoint
from actors.models.config import LoraConfig
from actors.trainer.config import TrainerConfig


class HFTrainingEngine:
    """`TrainingEngine` of actors.backends.contract. Moves `model` to `device` and from then on owns it.

    Its parameters are the master weights: float32 (float64 works too, for tests). Dropout stays off, so that log-probs
    are those of the policy that sampled. The critic of an algorithm that has one is trained beside it, and a reference
    policy, where one is asked for, is what the weights were before the first step.

    With several ranks, or another precision to compute in, all of that is sharded once the first step begins or a state
    is loaded. Until then `model` is whole and may be trained otherwise.

    reader: how the model is read, made of the model and, where the algorithm has a critic, of [algorithm] critic
    process_group: of all ranks, or None for one
    given: what groups bring from inference actors and is not computed here, of [inference] computes
    total_steps: of the job, for the schedule of the learning rate
    lora: an adapter, drawn from `seed`, is trained instead of the model; the model without it is the reference
    """

    def __init__(
        self,
        model: Any,
        *,
        algorithm: Algorithm,
        algorithm_config: AlgorithmConfig,
        config: TrainerConfig,
        reader: Callable[[Any, str | None], Reader] = TokenLogprobs,
        total_steps: int = 1,
        device: str | torch.device = "cpu",
        process_group: dist.ProcessGroup | None = None,
        given: Collection[str] = (),
        lora: LoraConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(True)
        self._algorithm = algorithm
        self._algorithm_config = settings = resolve(algorithm_config)
        self._config = config
        self._total_steps = total_steps
        self._ranks = Ranks(process_group, self.device)
        self._dtype = next(model.parameters()).dtype
        self._logprobs = reader(
            self.model, settings.critic if PAPERS[settings.name].critic else None
        )
        self._normalization = self._logprobs.normalization(settings.gamma)
        self._given = frozenset(given)
        self._needs_reference = "reference" not in self._given and settings.kl_coefficient > 0
        self._reference: Reader | None = None
        self._lora_config, self._seed = lora, seed
        self._lora: LoraAdapter | None = None
        self._base = torch.zeros(0, dtype=torch.uint8)  # checksum of what the adapter is on
        self._sharding: Sharding | None = None
        self._compute = torch.bfloat16 if config.dtype == "bfloat16" else self._dtype
        if process_group is not None or self._compute != self._dtype:
            self._sharding = Sharding(process_group, self.device, self._compute)
        self._sharded: dict[Reader, ShardedModule] = {}
        self._name_parameters()
        self._optimizer: Optimizer | None = None
        self._several_updates = settings.epochs * settings.mini_batches > 1
        # Until the whole step is there: its mean and deviation, or how to cut it into updates, are not known before.
        self._waits = self._several_updates or scope(settings) == "batch"
        self._held: list[GroupsLaidOut] = []
        self._steps = 0
        self._resident = True
        self._host_copies = HostCopies()
        self._trained = False  # a micro-batch, since the last update
        self._sums: dict[str, Tensor] = {}
        self._ratios = torch.zeros(disagreement.BUCKETS, dtype=torch.float64, device=self.device)

    # The step.

    def begin_step(self) -> None:
        """Forget gradients, sums, and groups that wait. Collective."""
        optimizer = self._ready()
        for sharded in self._sharded.values():
            sharded.release()  # of a step that was broken off
            sharded.gather()
        optimizer.forget_gradients()
        self._held = []
        self._trained = False
        if self._normalization is not None:
            self._normalization.begin()
        self._ratios.zero_()
        self._sums = self._no_sums()

    def accumulate(self, groups: Sequence[Group]) -> None:
        """Forward and backward over complete groups; where the algorithm's scope is the whole batch, or a step is
        several updates, forward only, for what advantages are computed from."""
        laid_out = lay_out(groups)
        self._check_given(laid_out.sequences)
        if self._normalization is not None:
            self._normalization.scale(laid_out)
        self._read_before_update(laid_out.sequences)
        set_targets(
            laid_out,
            self._algorithm,
            self._algorithm_config,
            critic=self._logprobs.has_critic,
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
        rate = learning_rate(self._config, self._steps, self._total_steps)
        if scope(self._algorithm_config) == "batch":
            held = [sequence for laid_out in self._held for sequence in laid_out.sequences]
            batch_statistics.normalize(held, self._ranks)
        losses: list[float] = []
        norms: list[float] = []
        totals: dict[str, float] = {}
        for part in self._updates():
            if part is not None:
                self._sums = self._no_sums()
                self._train(*part)
            sums, loss, grad_norm = self._update(rate)
            losses.append(loss)
            norms.append(grad_norm)
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
            if not np.isfinite((loss, grad_norm)).all():
                break
        for sharded in self._sharded.values():
            sharded.release()
        self._held = []
        if self._normalization is not None:
            self._normalization.finish(self._ranks)
        self._steps += 1
        histogram = self._ranks.sum_(self._ratios.clone())
        tokens = totals.pop("tokens")
        return {
            **{name: value / max(tokens, 1.0) for name, value in totals.items()},
            **disagreement.quantiles(histogram),
            "loss": sum(losses) / len(losses),
            "grad_norm": float(np.max(norms)),
            "learning_rate": rate,
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

    def _update(self, rate: float) -> tuple[dict[str, float], float, float]:
        """Reduce sums and gradients, and step the optimizer. Returns sums, loss and gradient norm."""
        names = sorted(self._sums)
        totals = self._ranks.sum_(torch.stack([self._sums[name] for name in names]))
        sums = dict(zip(names, totals.tolist(), strict=True))
        denominator = sums.pop("denominator")
        loss = sums.pop("loss") / max(denominator, 1.0)
        if self._logprobs in self._sharded:
            self._sharded[self._logprobs].reduce(trained=self._trained)
        self._trained = False
        grad_norm = self._ready().update(rate, denominator, loss=loss, tokens=sums["tokens"])
        return sums, loss, grad_norm

    def _check_given(self, sequences: list[TrainingSequence]) -> None:
        """What another actor computed is there, and was computed with the weights that this engine has now."""
        for sequence in sequences:
            for name in self._given:
                assert getattr(sequence, name) is not None, f"no inference actor gave {name}"
            assert sequence.read_by in (None, self._steps), (
                f"read by version {sequence.read_by} for the step of version {self._steps}"
            )

    @torch.no_grad()
    def _read_before_update(self, sequences: list[TrainingSequence]) -> None:
        """Values, reference and proximal log-probs, as far as they are asked for."""
        proximal = reads_proximal(self._algorithm_config) and "proximal" not in self._given
        critic = self._logprobs.has_critic and "values" not in self._given
        if not (self._needs_reference or critic or proximal):
            return
        for batch in micro_batches(sequences, self._config.micro_batch_tokens):
            packed = self._logprobs.batch(batch, self.device)
            if self._needs_reference:
                read = self._read_reference(packed)
                for sequence, values in packed.by_sequence(read.logprobs):
                    sequence.reference = values
            if not (critic or proximal):
                continue
            read = self._logprobs(packed, self._dtype)
            if proximal:
                for sequence, values in packed.by_sequence(read.logprobs):
                    sequence.proximal = values
            if critic:
                for sequence, values in packed.by_sequence(read.values):
                    sequence.values = values
                for sequence, value in zip(batch, read.last_values.tolist(), strict=True):
                    sequence.last_value = value

    def _read_reference(self, packed: Any) -> Readings:
        if self._lora is not None:
            with self._lora.off():
                read: Readings = self._logprobs(packed, self._dtype)
            return read
        assert self._reference is not None
        read = self._reference(packed, self._dtype)
        return read

    def _train(self, sequences: list[TrainingSequence], denominator: float) -> None:
        """Add the gradients and sums of these sequences to those of the update. Collective at the update's first."""
        if self._logprobs in self._sharded:
            self._sharded[self._logprobs].gather()
        self._sums["denominator"] += denominator
        self._sums["tokens"] += sum(len(sequence.positions) for sequence in sequences)
        for batch in micro_batches(sequences, self._config.micro_batch_tokens):
            self._backward(batch)
            self._trained = True

    def _backward(self, batch: list[TrainingSequence]) -> None:
        packed = self._logprobs.batch(batch, self.device)

        def per_token(arrays: list[Any]) -> Tensor | None:
            if any(array is None for array in arrays):
                return None
            return torch.from_numpy(np.concatenate(arrays)).to(self.device, self._dtype)

        read = self._logprobs(packed, self._dtype)
        entropy = read.entropies
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
                logprobs=read.logprobs,
                behaviour_logprobs=behaviour,
                advantages=advantages,
                weights=weights,
                entropy=entropy,
                sequences=packed.rows,
                turns=turn_numbers(batch).to(self.device),
                staleness=staleness,
                proximal_logprobs=per_token([s.proximal for s in batch]),
                reference_logprobs=per_token([s.reference for s in batch]),
                values=read.values,
                old_values=per_token([s.values for s in batch]),
                returns=per_token([s.returns for s in batch]),
            ),
            self._algorithm_config,
        )
        loss.backward()
        self._sums["loss"] += loss.detach()
        apart, histogram = disagreement.measure(read.logprobs, behaviour)
        self._ratios += histogram
        for name, value in {**sums, **apart}.items():
            self._sums[name] += value

    def _no_sums(self) -> dict[str, Tensor]:
        # The same names on every rank, also on one that gets no group.
        names = (
            "denominator",
            "tokens",
            "loss",
            *self._algorithm.METRICS,
            *disagreement.METRICS,
        )
        return {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in names}

    # Weights and state.

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's parameters under their Hugging Face names, tied ones once: the masters themselves. Under an
        adapter they are frozen, and in the precision that is computed in."""
        for name, parameter in self._published.items():
            yield name, parameter.detach()

    def critic_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The critic's parameters, named as in it: the masters themselves. None without a critic."""
        for name, parameter in self._logprobs.beside().items():
            yield name.removeprefix("critic."), parameter.detach()

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's matrices, "LAYER.lora_A" [rank, in] and "LAYER.lora_B" [out, rank], the masters themselves,
        whole on every rank; nothing without [model.lora]."""
        self._put_adapter_on()
        if self._lora is None:
            return {}
        return {name: parameter.detach() for name, parameter in self._lora.parameters().items()}

    def state(self) -> dict[str, Tensor]:
        """Parameters "model.*" (the critic's "model.critic.*"), moments "exp_avg.*" and "exp_avg_sq.*", the counters
        "steps" (of the schedule) and "updates" (of the optimizer), "reference.*" where there is one; not copies,
        and DTensors where sharded. With an adapter "adapter.*" in place of "model.*", and "base", uint8 [16], a
        checksum of the frozen model.
        """
        self._put_adapter_on()
        updates, moments = (0, {}) if self._optimizer is None else self._optimizer.moments()
        tensors = self._parameters | self._buffers
        named = {_saved_as(name): tensor for name, tensor in tensors.items()}
        if self._lora is not None:
            named[BASE] = self._base
        if self._reference is not None:
            named |= {f"reference.{n}": p for n, p in self._reference.model.named_parameters()}
        return {
            "steps": torch.tensor(self._steps),
            "updates": torch.tensor(updates),
            **{name: tensor.detach() for name, tensor in {**named, **moments}.items()},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state`; tensors may be whole. Raises ValueError naming what is missing or has another shape; nothing
        is changed then.

        A state from before the first step has no reference: its own weights are the reference. That of an adapter may
        hold the frozen model as "model.*"; else the model that this engine was given has to be the one. Raises
        BadCheckpoint where it is not.
        """
        updates = int(state.get("updates", torch.tensor(0)))
        self._put_adapter_on()
        self._check_fits(state, updates)
        self._load_base(state)
        optimizer = self._ready()
        for sharded in self._sharded.values():
            sharded.release()
        self._steps = int(state["steps"])
        with torch.no_grad():
            for name, tensor in (self._parameters | self._buffers).items():
                tensor.copy_(part_of(state[_saved_as(name)], tensor))
            optimizer.load_moments(updates, state)
            if self._reference is not None:
                for name, parameter in self._reference.model.named_parameters():
                    given = state.get(f"reference.{name}", state[f"model.{name}"])
                    parameter.copy_(part_of(given, parameter))

    def _load_base(self, state: Mapping[str, Tensor]) -> None:
        """See that the frozen model is the one that the adapter was trained on; loaded once, before it is sharded."""
        if self._lora is None or torch.equal(self._base, state[BASE]):
            return
        given = {name: state.get(f"model.{name}") for name in self._published}
        if self._optimizer is None and all(tensor is not None for tensor in given.values()):
            with torch.no_grad():
                for name, tensor in self._published.items():
                    tensor.copy_(state[f"model.{name}"])
            self._base = base_checksum(self._published)
        if not torch.equal(self._base, state[BASE]):
            raise BadCheckpoint(WRONG_BASE)

    def _check_fits(self, state: Mapping[str, Tensor], updates: int) -> None:
        begun = int(state.get("steps", torch.tensor(0))) > 0
        expected: dict[str, Tensor] = self._published if self._lora is None else {}
        expected = {f"model.{name}": tensor for name, tensor in expected.items()}
        if self._lora is not None:
            expected[BASE] = self._base
        for name, parameter in self._parameters.items():
            expected[_saved_as(name)] = parameter
            if updates:
                expected |= {f"{moment}.{name}": parameter for moment in MOMENTS}
        wrong = [name for name in ("steps", "updates") if name not in state]
        wrong += [
            name
            for name, tensor in expected.items()
            if (found := state.get(name)) is None or found.shape != tensor.shape
        ]
        if self._needs_reference and self._lora is None and begun:
            wrong += [
                f"reference.{name}" for name in self._published if f"reference.{name}" not in state
            ]
        if wrong:
            raise ValueError(
                f"the state does not fit the model: {', '.join(wrong[:3])} missing or of another shape"
                f"{f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''}; [model] must be that of the run"
            )

    def _ready(self) -> Optimizer:
        """What a step needs beside the model: made, and sharded, only once the model's first weights are settled."""
        if self._optimizer is None:
            self._put_adapter_on()
            if self._needs_reference and self._lora is None:
                self._reference = self._logprobs.frozen_copy()
            if self._config.gradient_checkpointing:
                _checkpoint_layers(self._logprobs)
            if self._config.compile:
                for module in self._modules():
                    module.compile_blocks()
            if self._sharding is not None:
                # An adapter is small: every rank has it whole, and in the masters' precision.
                whole = [] if self._lora is None else list(self._lora.parameters().values())
                for module in self._modules():
                    self._sharded[module] = self._sharding.shard(module, module.exact(), whole)
                self._name_parameters()
            self._optimizer = Optimizer(self._parameters, self._config, self._ranks)
        return self._optimizer

    def _put_adapter_on(self) -> None:
        if self._lora_config is not None and self._lora is None:
            self._lora = LoraAdapter(
                self.model, self._lora_config, seed=self._seed, compute_dtype=self._compute
            )
            self._name_parameters()
            self._base = base_checksum(self._published)

    def _name_parameters(self) -> None:
        kept = self.model.state_dict(keep_vars=True)
        self._buffers = {name: kept[name] for name, _ in self.model.named_buffers() if name in kept}
        if self._lora is None:
            parameters = dict(self.model.named_parameters())  # tied ones once
            self._published = parameters | self._buffers
        else:
            self._published = self._lora.base(self.model)
            parameters = {f"{ADAPTER}{n}": p for n, p in self._lora.parameters().items()}
        self._parameters = parameters | self._logprobs.beside()

    def _modules(self) -> list[Reader]:
        return [self._logprobs, *([] if self._reference is None else [self._reference])]

    # The device.

    def offload(self) -> None:
        """Weights and moments to the host, between two steps. On CPU they stay: device and host are one."""
        if self._optimizer is not None:
            self._optimizer.forget_gradients()
        for sharded in self._sharded.values():
            sharded.release()
        self._sums, self._held = {}, []
        if self.device.type != "cpu" and self._resident:
            self._host_copies.move_to_host(self._tensors())
            self._rebind()
        self._resident = False

    def onload(self) -> None:
        """Weights and moments to the device, as they were."""
        if self.device.type != "cpu" and not self._resident:
            self._host_copies.move_back(self._tensors(), self.device)
            self._rebind()
        self._resident = True

    def memory_bytes(self) -> int:
        """Device memory held now: weights, reference, gradients and moments (not activations, nor weights gathered)."""
        if not self._resident:
            return 0
        gradients = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        return sum(tensor.nbytes for tensor in (*self._tensors(), *gradients))

    def _rebind(self) -> None:
        for sharded in self._sharded.values():
            sharded.rebind()

    def _tensors(self) -> list[Tensor]:
        """This rank's parameters and buffers, the reference's and what the optimizer keeps, each once."""
        kept = [] if self._optimizer is None else self._optimizer.tensors()
        modules = self._modules()
        return [
            *(local(parameter) for each in modules for parameter in each.parameters()),
            *(buffer for each in modules for buffer in each.buffers()),
            *(local(tensor) for tensor in kept),
        ]


def _saved_as(name: str) -> str:
    return name if name.startswith(ADAPTER) else f"model.{name}"


def _checkpoint_layers(reader: Reader) -> None:
    """Compute activations of the blocks again in the backward pass, with dropout off all the same.

    transformers' blocks do so only while they themselves, not what is in them, are in training mode.
    """
    for model in reader.transformers():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in reader.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
