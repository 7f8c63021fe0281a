"""Log-probs of given tokens under the distribution that they were sampled from, with gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from actors.episodes import Sampling

MASKED = -1e9  # finite: minus infinity would make 0 * inf, not a number, of the entropy
CHUNK_ELEMENTS = 1 << 27  # logits held at a time: 0.5 GiB in float32


class TokenLogprobs:
    """Reads log-probs off a transformers causal LM at chosen places only.

    The language model head runs on those places in chunks whose logits are computed again in the backward pass: with
    a vocabulary of 150,000, keeping them for a whole micro-batch would take more memory than the model. Models that do
    more than the head between hidden states and logits (softcapping, scaling) take the whole forward instead.
    """

    def __init__(self, model: Any, *, plain_head: bool | None = None) -> None:
        """plain_head: as found for a model of the same kind; None finds out."""
        self._model = model
        self.plain_head = _has_plain_head(model) if plain_head is None else plain_head

    def __call__(
        self, inputs: Tensor, rows: Tensor, columns: Tensor, sampling: Sampling, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns log-probs [n] and the entropies of the distributions that the tokens were drawn from [n], as `dtype`.

        inputs: int64 [batch, time], padded on the right    rows, columns: int64 [n], the places of the tokens asked for
        A greedy transform (temperature 0) is read at temperature 1, as the sampler does.
        """
        targets = inputs[rows, columns]
        before = columns - 1  # the logits at a place predict the token after it
        if not self.plain_head:
            kept = before.unique()
            output = self._model(input_ids=inputs, use_cache=False, logits_to_keep=kept)
            logits = output.logits[rows, torch.searchsorted(kept, before)]
            return _read(logits.to(dtype), targets, sampling)
        # Padding is on the right, where causal attention never looks: no mask is needed.
        decoder = self._model.get_decoder()
        hidden = decoder(input_ids=inputs, use_cache=False).last_hidden_state[rows, before]
        head = self._model.get_output_embeddings()

        def read(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return _read(head(hidden).to(dtype), targets, sampling)

        chunk = max(1, CHUNK_ELEMENTS // head.weight.shape[0])
        if len(targets) <= chunk:
            return read(hidden, targets)
        pieces = [
            checkpoint(read, *piece, use_reentrant=False)
            for piece in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        logprobs, entropies = zip(*pieces, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)


@torch.no_grad()
def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the hidden states and nothing more."""
    device = next(model.parameters()).device
    # Several tokens: the embedding of the one for padding is often zero, and so are its logits, capped or not.
    tokens = torch.arange(min(8, model.get_output_embeddings().weight.shape[0]), device=device)
    hidden = model.get_decoder()(input_ids=tokens[None], use_cache=False).last_hidden_state
    logits = model(input_ids=tokens[None], use_cache=False).logits
    return torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-3, atol=1e-5)


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
    return log_probabilities.gather(1, targets[:, None])[:, 0], entropies
