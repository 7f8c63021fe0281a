"""Log-probs of given tokens under the distribution that they were sampled from, with gradient, and their values."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actors.backends.critic import Critic
from actors.backends.packed_attention import PACKED
from actors.backends.packing import PackedBatch, Packing
from actors.backends.reading import Reader, Readings
from actors.backends.sharding import blocks
from actors.backends.training_batches import TrainingSequence
from actors.episodes import Sampling

MASKED = -1e9  # finite: minus infinity would make 0 * inf, not a number, of the entropy
CHUNK_ELEMENTS = {
    "cpu": 1 << 27,
    "cuda": 1 << 29,
}  # logits held at a time: 2 GiB in float32 on GPUs


class TokenLogprobs(Reader):
    """A transformers causal LM and, where there is one, its critic, read at the trained tokens only.

    The language model head runs on those places in chunks whose logits are computed again in the backward pass: with
    a vocabulary of 150,000, keeping them for a whole micro-batch would take more memory than the model. Models that do
    more than the head between hidden states and logits (softcapping, scaling) take the whole forward instead.

    Raises ValueError for a model in which sequences that share a row would see each other.
    """

    def __init__(self, model: Any, critic: str | None = None) -> None:
        """critic: None, or of [algorithm] critic"""
        super().__init__()
        self.model = model
        if model.config._attn_implementation != PACKED:
            model.set_attn_implementation(PACKED)
            _check_packs(model)
        self.critic = None if critic is None else Critic(model, own_trunk=critic == "model")
        self._plain_head = _has_plain_head(model)
        self._read = _read

    def compile_blocks(self) -> None:
        for block in blocks(self):
            block.forward = torch.compile(block.forward)
        self._read = torch.compile(_read)

    @property
    def has_critic(self) -> bool:
        return self.critic is not None

    def batch(self, sequences: list[TrainingSequence], device: torch.device) -> PackedBatch:
        return PackedBatch(sequences, device)

    def beside(self) -> dict[str, nn.Parameter]:
        critic = [] if self.critic is None else self.critic.named_parameters()
        return {f"critic.{name}": parameter for name, parameter in critic}

    def frozen_copy(self) -> "TokenLogprobs":
        frozen = TokenLogprobs(copy.deepcopy(self.model))
        return frozen.requires_grad_(False)

    def transformers(self) -> list[Any]:
        trunk = None if self.critic is None else self.critic.trunk
        return [model for model in (self.model, trunk) if model is not None]

    def exact(self) -> list[nn.Module]:
        return [] if self.critic is None else [self.critic.head]

    def forward(self, batch: PackedBatch | None, dtype: torch.dtype | None = None) -> Any:
        """`Readings` of a batch. A greedy transform (temperature 0) is read at temperature 1, as the sampler does.

        Without a batch, a zero that next to nothing was computed for, with gradient: `ShardedModule` asks for it.
        """
        if batch is None:
            trained = [p for p in self.parameters() if p.requires_grad] or self.parameters()
            return (min(trained, key=Tensor.numel) * 0).sum()
        assert dtype is not None
        targets = batch.tokens[0, batch.places]
        before = batch.places - 1  # the logits at a place predict the token after it
        if not self._plain_head:
            kept = before.unique()
            shared = self.critic is not None and self.critic.trunk is None
            output = self._run(self.model, batch, logits_to_keep=kept, output_hidden_states=shared)
            logits = output.logits[0, torch.searchsorted(kept, before)]
            hidden = output.hidden_states[-1][0] if shared else output.logits[0, :0]
            logprobs, entropies = self._read(logits.to(dtype), targets, batch.sampling)
        else:
            hidden = self._run(self.model.get_decoder(), batch).last_hidden_state[0]
            logprobs, entropies = self._in_chunks(hidden[before], targets, batch.sampling, dtype)
        if self.critic is None:
            return Readings(logprobs, entropies, None, None)
        if self.critic.trunk is not None:
            hidden = self._run(self.critic.trunk, batch).last_hidden_state[0]
        values = self.critic(hidden[torch.cat([before, batch.ends])])
        last_values = values[len(before) :].detach()  # read, never trained
        return Readings(logprobs, entropies, values[: len(before)].clone(), last_values)

    def _run(self, model: Any, batch: PackedBatch, **more: Any) -> Any:
        return _run_packed(model, batch.tokens, batch.packing, **more)

    def _in_chunks(
        self, hidden: Tensor, targets: Tensor, sampling: Sampling, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()

        def read(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return self._read(head(hidden).to(dtype), targets, sampling)

        chunk = max(1, CHUNK_ELEMENTS[hidden.device.type] // head.weight.shape[0])
        if len(targets) <= chunk:
            return read(hidden, targets)
        pieces = [
            checkpoint(read, *piece, use_reentrant=False)
            for piece in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)


def _run_packed(model: Any, tokens: Tensor, packing: Packing, **more: Any) -> Any:
    return model(
        input_ids=tokens,
        position_ids=packing.positions,
        packing=packing,
        use_cache=False,
        **more,
    )


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the hidden states and nothing more."""
    tokens = _some_tokens(model)
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def _check_packs(model: Any) -> None:
    """Two sequences in a row must read as each does alone: state that runs on, or positions that do not start again,
    would make another policy of it."""
    tokens = _some_tokens(model)
    half = tokens.shape[1] // 2
    packing = Packing([half, half], tokens.device)
    decoder = model.get_decoder()
    together = _run_packed(decoder, tokens[:, : 2 * half], packing).last_hidden_state[0, half:]
    second = tokens[:, half : 2 * half]
    alone = decoder(input_ids=second, use_cache=False).last_hidden_state[0]
    if (together - alone).norm() > 0.05 * alone.norm():  # half precision on a GPU is within 0.01
        raise ValueError(
            f"{type(model).__name__} cannot be trained: sequences packed into one row see each other there (recurrent "
            "layers, or attention of its own). Take a model whose attention transformers can replace"
        )


def _some_tokens(model: Any) -> Tensor:
    """Several: the embedding of the one for padding is often zero, and so are its logits, capped or not."""
    device = next(model.parameters()).device
    return torch.arange(min(8, model.get_output_embeddings().weight.shape[0]), device=device)[None]


def _read(logits: Tensor, targets: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits: [n, vocab], as the model gives them. targets: int64 [n]. Returns log-probs [n] and entropies [n]."""
    if sampling.vocabulary is not None:
        first, end = sampling.vocabulary
        outside = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        outside[first:end] = False
        logits = logits.masked_fill(outside, MASKED)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        # The token was among the sampler's k likeliest; it stays when newer weights rank it lower.
        below = (logits < kth).scatter(1, targets[:, None], False)
        logits = logits.masked_fill(below, MASKED)
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    log_probabilities = logits.log_softmax(-1)
    entropies = -(log_probabilities.exp() * log_probabilities).sum(-1)
    places = torch.arange(len(targets), device=targets.device)
    return log_probabilities[places, targets], entropies
