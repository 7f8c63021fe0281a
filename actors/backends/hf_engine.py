"""A generation engine on any Hugging Face transformers decoder, on a CPU or one GPU.

It exists so that everything runs without a serving engine installed. This module decides who runs
when (continuous batching, fixed batches); `hf_lane` runs them.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from actors.backends.contract import Generation, GenerationRequest
from actors.backends.hf_adapter import UnmergedAdapter
from actors.backends.hf_lane import Lane
from actors.backends.hf_requests import as_it_came, check_request, finish_on_arrival
from actors.backends.hf_runner import ModelRunner
from actors.backends.hf_weights import ModelWeights
from actors.models.loading import cast_parameters
from channels.weights.delta import WeightsDelta


class HFGenerationEngine:
    """`GenerationEngine` on a transformers causal LM, which it owns from then on.

    model: moved to `device` and `dtype`, and set to evaluate
    max_running: sequences inside at one time, waiting ones and idle rows of fixed batches included
    max_context_tokens: context and sampled tokens at which a sequence ends with "length"
    pad_token: fills prefill batches; any token of the vocabulary
    version: of the weights that the model has; -1 where others are loaded before anything is asked

    Each `step` runs one decode forward for all rows and before it, when there are new requests, one
    prefill (several when they are long). Requests that carry a `batch` number run in a batch of
    their own, one such batch at a time, beside the others: add all of its members before the next
    `step`. What they give depends on nothing but the batch and the weights, to the last bit on one
    kind of hardware and thread count; a member's row does not depend on the order of `add`.
    Resuming a batch's requests after `abort` keeps their tokens, but not the last bits of their
    log-probs.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_running: int,
        max_context_tokens: int,
        pad_token: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        version: int = -1,
    ) -> None:
        self._device = torch.device(device)
        model.eval().requires_grad_(False).to(device=self._device)
        cast_parameters(model, dtype)
        self._runner = ModelRunner(model, self._device)
        self._vocabulary_size = self._runner.vocabulary_size
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and max_context_tokens > positions:
            raise ValueError(
                f"max_context_tokens = {max_context_tokens} is beyond the model's {positions} "
                f"positions: lower it to {positions}, or load a model made for longer contexts"
            )
        if max_running < 1 or max_context_tokens < 2:
            raise ValueError(
                f"max_running = {max_running}, max_context_tokens = {max_context_tokens}: "
                "at least 1 sequence and 2 tokens are needed"
            )
        if not 0 <= pad_token < self._vocabulary_size:
            raise ValueError(
                f"pad_token = {pad_token} is outside the vocabulary [0, {self._vocabulary_size}): "
                "any token that the tokenizer knows will do"
            )
        self._max_running = max_running
        self._max_context_tokens = max_context_tokens
        self._weights = ModelWeights(model, self._device)
        self._adapter = UnmergedAdapter(model, self._device)
        self._lane, self._batch_lane = (
            Lane(
                self._runner,
                max_rows=max_running,
                max_context_tokens=max_context_tokens,
                pad_token=pad_token,
                fixed=fixed,
            )
            for fixed in (False, True)
        )
        self._waiting: list[GenerationRequest] = []
        self._open_batches: dict[int, list[GenerationRequest]] = {}
        self._sealed_batches: deque[tuple[int, list[GenerationRequest]]] = deque()
        self._running_batch: int | None = None
        self._request_ids: set[int] = set()
        self._version = version

    @property
    def num_running(self) -> int:
        """Sequences that have not ended, waiting ones included."""
        return len(self._request_ids)

    @property
    def free_slots(self) -> int:
        """Requests that can be added now. Before adding a fixed batch, see that all of it fits."""
        idle = len(self._batch_lane.rows) - self._batch_lane.num_active
        return self._max_running - len(self._request_ids) - idle

    @property
    def version(self) -> int:
        """The policy version of the weights in use; -1 before the first, unless the model came with one."""
        return self._version

    def can_admit(self, request: GenerationRequest) -> bool:
        """Whether `add` would find room now. ValueError for a request that could never run."""
        check_request(request, self._vocabulary_size, self._max_context_tokens)
        return self.free_slots > 0

    def add(self, request: GenerationRequest) -> None:
        """Admit a request; the next `step` prefills it.

        Raises ValueError where it could never run, finds no room, or comes to a batch that began.
        """
        check_request(request, self._vocabulary_size, self._max_context_tokens)
        if not self._weights.resident:
            raise ValueError(
                f"request {request.request_id}: the engine is offloaded; call onload() first"
            )
        if self.free_slots < 1:
            raise ValueError(
                f"request {request.request_id}: all {self._max_running} slots are taken; "
                "ask can_admit() first, or raise max_running"
            )
        if request.request_id in self._request_ids:
            raise ValueError(
                f"request {request.request_id} is in the engine already: use an id once until it "
                "has ended"
            )
        if request.batch is None:
            self._waiting.append(request)
        elif request.batch == self._running_batch or any(
            number == request.batch for number, _ in self._sealed_batches
        ):
            raise ValueError(
                f"request {request.request_id}: batch {request.batch} has begun; "
                "add all requests of a batch before the next step(), or give this one another "
                "number"
            )
        else:
            self._open_batches.setdefault(request.batch, []).append(request)
        self._request_ids.add(request.request_id)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Advance every running sequence by one token; returns those that ended.

        Raises FloatingPointError where the weights give logits that are not finite; after it only
        `abort` is of use.
        """
        ended: list[Generation] = []
        self._sealed_batches.extend(self._open_batches.items())
        self._open_batches.clear()
        if self._waiting:
            self._admit(self._lane, self._waiting, ended)
            self._waiting = []
        while self._sealed_batches and not len(self._batch_lane.rows):
            self._running_batch, requests = self._sealed_batches.popleft()
            self._admit(self._batch_lane, requests, ended)
        ended += self._lane.step(self._version)
        ended += self._batch_lane.step(self._version)
        return self._leave(ended)

    @torch.inference_mode()
    def abort(self, request_ids: Iterable[int] | None = None) -> list[Generation]:
        """Stop sequences (all when None) and return what they have, finish "aborted".

        Ids of sequences that are not here (they may just have ended) are passed over.
        """
        ids = None if request_ids is None else frozenset(request_ids)
        aborted: list[Generation] = []
        self._waiting = _without(self._waiting, ids, aborted)
        for number, requests in list(self._open_batches.items()):
            self._open_batches[number] = _without(requests, ids, aborted)
        self._sealed_batches = deque(
            (number, _without(requests, ids, aborted)) for number, requests in self._sealed_batches
        )
        aborted += self._lane.abort(ids)
        aborted += self._batch_lane.abort(ids)
        return self._leave(aborted)

    @torch.inference_mode()
    def load_weights(self, version: int, weights: Mapping[str, Tensor] | WeightsDelta) -> None:
        """Copy new weights in place, all or nothing; see `ModelWeights` for names and errors. An adapter is taken off.

        Running sequences keep their tokens, log-probs and versions, and have their prefix prefilled
        again by the next `step`.
        """
        if isinstance(weights, WeightsDelta):
            self._weights.apply(weights)
        else:
            self._weights.load(weights)
        self._adapter.clear()
        self._adopted(version)

    @torch.inference_mode()
    def load_adapter(self, version: int, adapter: Mapping[str, Tensor], scale: float) -> None:
        """Put an adapter beside the weights, all or nothing; see `UnmergedAdapter` for names and errors."""
        self._adapter.load(adapter, scale)
        self._adopted(version)

    def weights_in_place(self) -> Mapping[str, Tensor]:
        """The parameters by their Hugging Face names, tied ones once."""
        return self._weights.in_place()

    @torch.inference_mode()
    def weights_replaced(self, version: int) -> None:
        """The parameters were written from outside: as after `load_weights`."""
        self._weights.replaced()
        self._adapter.clear()
        self._adopted(version)

    def _adopted(self, version: int) -> None:
        self._version = version
        self._lane.forget_prefixes()
        self._batch_lane.forget_prefixes()

    def offload(self) -> None:
        """Give up device memory: the KV cache is dropped, weights on a GPU go to the host.

        Raises ValueError while sequences are inside.
        """
        if self._request_ids:
            raise ValueError(
                f"offload with {len(self._request_ids)} sequences inside: abort() them first and "
                "add them elsewhere"
            )
        self._lane.forget_prefixes()
        self._batch_lane.forget_prefixes()
        self._weights.offload()

    def onload(self) -> None:
        """Take device memory again; the weights are those of before, or what was loaded since."""
        self._weights.onload()

    def memory_bytes(self) -> int:
        """Device memory held now: weights, adapter and KV cache, without a step's activations."""
        caches = self._lane.cache.memory_bytes() + self._batch_lane.cache.memory_bytes()
        weights = self._weights.memory_bytes()
        return weights + (self._adapter.size_bytes() if weights else 0) + caches

    def _admit(
        self, lane: Lane, requests: list[GenerationRequest], ended: list[Generation]
    ) -> None:
        """Give requests rows; those that had ended before they came go straight to `ended`."""
        runnable = []
        for request in requests:
            finish = finish_on_arrival(request, self._max_context_tokens)
            if finish is None:
                runnable.append(request)
            else:
                ended.append(as_it_came(request, finish))
        if runnable:
            lane.admit(runnable)

    def _leave(self, generations: list[Generation]) -> list[Generation]:
        self._request_ids.difference_update(g.request_id for g in generations)
        if not len(self._batch_lane.rows):
            self._running_batch = None
        return generations


def _without(
    requests: list[GenerationRequest], ids: frozenset[int] | None, aborted: list[Generation]
) -> list[GenerationRequest]:
    """The requests that stay; those named by `ids` (all when None) go to `aborted`."""
    stay = []
    for request in requests:
        if ids is None or request.request_id in ids:
            aborted.append(as_it_came(request, "aborted"))
        else:
            stay.append(request)
    return stay
