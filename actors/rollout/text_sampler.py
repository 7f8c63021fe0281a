"""Samples token sequences with a generation engine: the sampler of language models."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.backends.contract import Generation, GenerationEngine, GenerationRequest, Policy
from actors.episodes import Action, Int32, Sampling, TurnRequest
from actors.job_config import JobConfig
from actors.rollout.work import Advanced, Work, sample_key

if TYPE_CHECKING:
    import torch

    from channels.weights.delta import WeightsDelta

SAMPLED = ("sampled", "sampled_logprobs", "sampled_versions")
ADVANCE_S = 0.05  # engine steps between two looks at the mailbox


@dataclass
class Progress:
    """What became of a request so far. requests: None where there is no room left    results: may be partial"""

    prompts: list[Int32] = field(default_factory=list)
    requests: list[GenerationRequest | None] = field(default_factory=list)
    results: dict[int, Generation] = field(default_factory=dict)  # by position

    @property
    def complete(self) -> bool:
        return all(
            request is None or (i in self.results and self.results[i].finish in ("stop", "length"))
            for i, request in enumerate(self.requests)
        )


class TextSampler:
    """`actors.rollout.work.Sampler`. Builds model and tokenizer on the host at once; blocking."""

    def __init__(self, config: JobConfig, *, device: str, counters: dict[str, float]) -> None:
        self._config = config
        self._device = device
        self._counters = counters
        self.engine: GenerationEngine | None = None
        self.running: list[Work] = []
        self.gather_s = 0.002  # what starts together shares every decode step
        self.at_a_time = max(1, config.rollout.max_running // config.rollout.group_size)
        self.by_request: dict[int, tuple[Work, int]] = {}
        self._sampling = Sampling(
            temperature=config.rollout.temperature, top_k=config.rollout.top_k
        )
        self._next_id = 0
        self._model, self.policy, self._pad_token = self._build()

    def _build(self) -> tuple[Any, Policy, int]:
        import torch

        from actors.models.loading import build_model
        from actors.models.text_policy import TextPolicy

        model, tokenizer = build_model(
            self._config.model,
            seed=self._config.job.seed,
            dtype=getattr(torch, self._config.rollout.dtype),
        )
        policy = TextPolicy(tokenizer, generation_config=model.generation_config)
        pad_token = tokenizer.pad_token_id
        return model, policy, policy.stop_tokens[0] if pad_token is None else pad_token

    @property
    def has_device(self) -> bool:
        return self.engine is not None

    def take_device(self) -> None:
        if self.engine is not None:
            self.engine.onload()
            return
        import torch

        from actors.backends.hf_engine import HFGenerationEngine

        config = self._config.rollout
        self.engine = HFGenerationEngine(
            self._model,
            max_running=config.max_running,
            max_context_tokens=config.max_context_tokens,
            pad_token=self._pad_token,
            device=self._device,
            dtype=getattr(torch, config.dtype),
            version=-1
            if self._config.job.steps
            else 0,  # without a trainer the model is what it is
        )

    def offload(self) -> None:
        assert self.engine is not None
        self.engine.offload()

    def memory_bytes(self) -> int:
        return 0 if self.engine is None else self.engine.memory_bytes()

    def load_weights(
        self, version: int, weights: "Mapping[str, torch.Tensor] | WeightsDelta"
    ) -> None:
        assert self.engine is not None
        self.engine.load_weights(version, weights)

    def load_adapter(self, version: int, adapter: "Mapping[str, torch.Tensor]") -> None:
        lora = self._config.model.lora
        assert self.engine is not None
        assert lora is not None, "an adapter in a job without [model.lora]"
        self.engine.load_adapter(version, adapter, lora.scale)

    def weights_in_place(self) -> "Mapping[str, torch.Tensor]":
        return {} if self.engine is None else self.engine.weights_in_place()

    def weights_replaced(self, version: int) -> None:
        assert self.engine is not None
        self.engine.weights_replaced(version)

    def advance(self, admissible: Sequence[Work], interrupted: Callable[[], bool]) -> Advanced:
        assert self.engine is not None
        waiting = deque(admissible)
        started = self._start(waiting)
        until = time.monotonic() + ADVANCE_S
        while self.engine.num_running:
            ended: list[Progress] = []
            for generation in self.engine.step():
                work, position = self.by_request.pop(generation.request_id)
                work.state.results[position] = generation
                ended.append(work.state)
            # Single samples that ended have nowhere to go yet: only a whole request is worth a stop.
            if any(progress.complete for progress in ended) or interrupted():
                break
            if time.monotonic() > until:
                break
            if ended:
                started += self._start(waiting)
        finished = []
        for work in [work for work in self.running if work.state.complete]:
            self.running.remove(work)
            finished.append((work, self._actions(work)))
        return Advanced(started, finished)

    def suspend(self) -> list[Work]:
        if self.engine is not None:
            for generation in self.engine.abort():
                work, position = self.by_request.pop(generation.request_id)
                progress: Progress = work.state
                request = progress.requests[position]
                assert request is not None
                if request.batch is None:
                    progress.requests[position] = replace(
                        request,
                        sampled=generation.tokens,
                        sampled_logprobs=generation.logprobs,
                        sampled_versions=generation.versions,
                    )
                else:
                    progress.results.clear()  # a fixed batch starts over, whole
        stopped, self.running = self.running, []
        return stopped

    def drop(self, work: Work) -> None:
        self.running.remove(work)
        ids = [i for i, (owner, _) in self.by_request.items() if owner is work]
        if ids and self.engine is not None:
            self.engine.abort(ids)
            for i in ids:
                del self.by_request[i]

    def with_progress(self, work: Work) -> TurnRequest:
        progress: Progress | None = work.state
        if progress is None or self._config.job.deterministic:
            return work.request  # nothing begun, or a fixed batch, which starts over
        samples = []
        for position, sample in enumerate(work.request.samples):
            request, generation = progress.requests[position], progress.results.get(position)
            if generation is not None:
                sample = replace(
                    sample,
                    prompt=progress.prompts[position],
                    sampled=generation.tokens,
                    sampled_logprobs=generation.logprobs,
                    sampled_versions=generation.versions,
                    finish=generation.finish,
                )
            elif request is not None:
                sample = replace(
                    sample,
                    prompt=progress.prompts[position],
                    **{name: getattr(request, name) for name in SAMPLED},
                    finish=None,
                )
            samples.append(sample)
        return replace(work.request, samples=tuple(samples))

    def _start(self, waiting: deque[Work]) -> list[Work]:
        """Give the engine requests while it has room, in order; those that it took leave `waiting`."""
        assert self.engine is not None
        started: list[Work] = []
        while waiting:
            work = waiting[0]
            if work.state is None:
                self._prepare(work)
            progress: Progress = work.state
            missing = [
                (i, request)
                for i, request in enumerate(progress.requests)
                if request is not None and i not in progress.results
            ]
            if missing and not self._has_room([request for _, request in missing]):
                break
            for position, request in missing:
                self.by_request[request.request_id] = (work, position)
                self.engine.add(request)
            self.running.append(work)
            started.append(waiting.popleft())
        return started

    def _has_room(self, requests: list[GenerationRequest]) -> bool:
        """All samples of a turn start together."""
        assert self.engine is not None
        return len(requests) <= self.engine.free_slots and self.engine.can_admit(requests[0])

    def _prepare(self, work: Work) -> None:
        """Make the engine's requests of a turn: prompts are tokenized here and nowhere else."""
        config, progress = self._config.rollout, Progress()
        for sample in work.request.samples:
            prompt = sample.prompt  # there if another rollout actor handed it back
            if prompt is None:
                prompt = self.policy.encode(sample.history, sample.observation)
            progress.prompts.append(prompt)
            context = np.concatenate([sample.history, prompt])
            if len(context) >= config.max_context_tokens:
                if work.request.turn == 0:
                    raise ValueError(
                        f"group {work.request.group}: its prompt has {len(context)} tokens and leaves no room in "
                        f"rollout.max_context_tokens = {config.max_context_tokens}: raise it, or shorten the prompt"
                    )
                progress.requests.append(None)
                continue
            self._next_id += 1
            partial = {
                name: getattr(sample, name) for name in SAMPLED if sample.sampled is not None
            }
            request = GenerationRequest(
                request_id=self._next_id,
                context=context,
                max_new_tokens=config.max_new_tokens,
                key=sample_key(self._config.job.seed, work.request, sample.sample),
                sampling=work.request.sampling or self._sampling,
                stop_tokens=self.policy.stop_tokens,
                batch=work.order if self._config.job.deterministic else None,
                **partial,
            )
            progress.requests.append(request)
            if sample.finish in ("stop", "length"):
                progress.results[len(progress.requests) - 1] = Generation(
                    request_id=request.request_id,
                    tokens=request.sampled,
                    logprobs=request.sampled_logprobs,
                    versions=request.sampled_versions,
                    finish=sample.finish,
                )
        work.state = progress

    def _actions(self, work: Work) -> list[Action | None]:
        progress: Progress = work.state
        actions: list[Action | None] = []
        for position, (prompt, request) in enumerate(
            zip(progress.prompts, progress.requests, strict=True)
        ):
            if request is None:
                actions.append(None)
                continue
            generation = progress.results[position]
            self._counters["tokens"] = self._counters.get("tokens", 0) + len(generation.tokens)
            actions.append(
                Action(
                    prompt=prompt,
                    tokens=generation.tokens,
                    logprobs=generation.logprobs,
                    versions=generation.versions,
                    mask=np.ones(len(generation.tokens), dtype=np.bool_),
                    text=self.policy.decode(generation.tokens),
                    finish=generation.finish,
                    sampling=work.request.sampling or self._sampling,
                )
            )
        return actions
