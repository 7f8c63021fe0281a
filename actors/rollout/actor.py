"""The rollout actor: continues token sequences for env actors with the newest weights that the policy clock allows.

It holds requests (a turn of a group each, see actors/env/actor.py), feeds them to its generation engine as there is
room, and acknowledges each with its actions. It keeps nothing that another rollout actor could not make again: asked to
leave, or parked in mid-generation, it stops its sequences and keeps or hands back the tokens that they have.

A request says which version it may be sampled with: `exact` (that version and no other; older versions are still in the
node's host copy), or at least `version`. When weights are swapped is [rollout] adopt: between turns, or in
mid-generation.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import actors.wire  # noqa: F401  registers the payload types
from actors.actor import Actor
from actors.backends.contract import Generation, GenerationEngine, GenerationRequest, Policy
from actors.episodes import Action, Int32, Sampling, TurnRequest
from actors.randomness import fold
from channels.channel import Item
from channels.errors import VersionGone, WeightsMismatch
from channels.lifecycle import Introduce
from channels.messages import Message
from channels.weights import WeightsDirectory, WeightsPublished
from channels.work import StageTimes

NOTHING = (-1, -1)  # no version is loaded
KEY_OF_SAMPLE = 2  # purpose of the key that a turn's draws come from
SAMPLED = ("sampled", "sampled_logprobs", "sampled_versions")
ADVANCE_S = 0.05  # engine steps between two looks at the mailbox
GATHER_S = 0.002  # an idle engine starts once no request has come for so long
PREFETCH = (
    1.25  # requests held beyond what the engine can run, so that it never waits for a round trip
)


@dataclass
class Work:
    """A request while it is held: its samples, and what came of each so far."""

    item: Item
    order: int
    watch: asyncio.Task[None]  # for its cancellation
    prompts: list[Int32] = field(default_factory=list)
    requests: list[GenerationRequest | None] = field(default_factory=list)  # None: no room left
    results: dict[int, Generation] = field(default_factory=dict)  # by position; may be partial

    @property
    def request(self) -> TurnRequest:
        request: TurnRequest = self.item.payload
        return request

    @property
    def complete(self) -> bool:
        return all(
            request is None or (i in self.results and self.results[i].finish in ("stop", "length"))
            for i, request in enumerate(self.requests)
        )


class RolloutActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Build model and tokenizer on the host; device memory is taken under the lease."""
        config = self.config.rollout
        self.engine: GenerationEngine | None = None
        self.offloaded = False
        self.sampling = Sampling(temperature=config.temperature, top_k=config.top_k)
        self.pending: list[Work] = []
        self.running: list[Work] = []
        self.finished: list[tuple[Work, list[Action | None]]] = []  # to be acknowledged
        self.by_request: dict[int, tuple[Work, int]] = {}
        self.next_id = 0
        self.order = 0
        self.newest: WeightsPublished | None = None
        self.loaded = NOTHING  # (run attempt, version)
        self.gone: set[tuple[int, int]] = set()  # versions that the node no longer has
        self.wake = asyncio.Event()
        self.weights = WeightsDirectory(
            Path(self.spec.weights_dir), keep=self.config.job.max_staleness + 2
        )
        self.at_a_time = max(1, config.max_running // config.group_size)  # requests
        capacity = max(2, int(self.at_a_time * PREFETCH))
        self.requests = self.router.consumer("requests", capacity=capacity)
        self.model, self.policy, self.pad_token = await self.blocking(self._build)

    def _build(self) -> tuple[Any, Policy, int]:
        import torch

        from actors.models.loading import build_model
        from actors.models.text_policy import TextPolicy

        model, tokenizer = build_model(
            self.config.model,
            seed=self.config.job.seed,
            dtype=getattr(torch, self.config.rollout.dtype),
        )
        policy = TextPolicy(tokenizer, generation_config=model.generation_config)
        pad_token = tokenizer.pad_token_id
        return model, policy, policy.stop_tokens[0] if pad_token is None else pad_token

    async def run(self) -> None:
        """Generate while there is something to generate."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take(tasks))
            tasks.create_task(self._generate())

    async def leave(self) -> None:
        """Hand every request back with the tokens it has."""
        if self.engine is not None:
            await self.blocking(self._suspend)  # after the step that may still be under way
        self._deliver()
        for work in self.pending:
            work.item.hand_back(self._with_partial_results(work))
        self.requests.close()

    async def park(self, offload: bool) -> int:
        """Stop sequences (they go on later with the tokens they have) and free the device if asked."""
        if self.engine is None:
            return 0
        await self.blocking(self._suspend)
        if offload:
            await self.blocking(self.engine.offload)
            self.offloaded = True
        return self.engine.memory_bytes()

    def on_peer(self, peer: Introduce) -> None:
        """Env actors send requests."""
        if peer.kind == "env":
            self.requests.add_producer(peer.peer)

    def on_peer_lost(self, peer: Introduce) -> None:
        """Requests of a dead env actor are void."""
        if peer.kind == "env":
            self.requests.remove_producer(peer.peer)
            self.wake.set()

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        """New weights can be loaded."""
        if isinstance(message, WeightsPublished):
            key = (message.run_attempt, message.policy_version)
            if self.newest is None or key > (
                self.newest.run_attempt,
                self.newest.policy_version,
            ):
                self.newest = message
                self.wake.set()
                self.endpoint.send(sender, StageTimes(seconds=self.time.seconds()))

    def report(self) -> dict[str, Any]:
        """Time shares, and the version in use."""
        return {**super().report(), "policy_version": self.loaded[1]}

    async def _take(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            item = await self.requests.get()
            self.order += 1
            watch = tasks.create_task(self._wake_when_cancelled(item))
            self.pending.append(Work(item, self.order, watch))
            self.wake.set()

    async def _wake_when_cancelled(self, item: Item) -> None:
        """One that waits for weights that never come would keep its place, and with it its env actor."""
        await item.wait_cancelled()
        self.wake.set()

    async def _generate(self) -> None:
        self.time.enter("wait_requests")
        while True:
            self.wake.clear()
            self._drop_cancelled()
            version = self._version_to_load()
            admissible = self._admissible(version or self.loaded)
            if version is None and not admissible and not self.running:
                self.lease.idle()
                with self.time.measure("wait_weights" if self.pending else "wait_requests"):
                    await self.wake.wait()
                    await self._gather()
                continue
            with self.time.measure("wait_lease"):
                await self.lease.__aenter__()
            try:
                # While the lease was waited for, requests came and went, and newer weights came out.
                self.wake.clear()
                self._drop_cancelled()
                version = self._version_to_load()
                await self._compute(version)
            finally:
                await self.lease.__aexit__(None, None, None)

    async def _gather(self) -> None:
        """Wait for the rest of a burst, as long as there is room for it: requests that start together share every
        decode step, and they come in bursts, one after each step of the trainer.
        """
        seen = None
        while self.order != seen and len(self.pending) < self.at_a_time:
            seen = self.order
            await asyncio.sleep(GATHER_S)

    async def _compute(self, version: tuple[int, int] | None) -> None:
        """One stay on the device: weights if due, new sequences, then tokens until something happens."""
        if self.engine is None or self.offloaded:
            await self.compute("onload", self._take_device)
        if version is not None:
            try:
                await self.compute("load_weights", self._load, version)
            except VersionGone:
                # The job is past it: whoever asks for it withdraws. A newer one is on its way here.
                self.log.warning("weights are gone run_attempt=%d version=%d", *version)
                self.gone.add(version)
                return
        await self.compute("generate", self._advance, self._admissible(self.loaded))
        assert self.engine is not None
        self.lease.check_memory(self.engine.memory_bytes())
        self._deliver()

    def _deliver(self) -> None:
        finished, self.finished = self.finished, []
        for work, actions in finished:
            work.watch.cancel()
            work.item.ack(None if work.item.cancelled else tuple(actions))
            self.delivered()

    def _version_to_load(self) -> tuple[int, int] | None:
        """The version to swap to now, or None to go on with the loaded one."""
        if self.newest is None:
            return None
        attempt, newest = self.newest.run_attempt, self.newest.policy_version
        if self.running:
            due = self.config.rollout.adopt == "token" and (attempt, newest) > self.loaded
            return (attempt, newest) if due and (attempt, newest) not in self.gone else None
        wanted = [
            w
            for w in self.pending
            if w.request.run_attempt == attempt and w.request.version <= newest
        ]
        exact = [
            w.request.version
            for w in wanted
            if w.request.exact and (attempt, w.request.version) not in self.gone
        ]
        if exact:
            # The oldest first: its group is the next to be trained.
            version = min(exact)
        elif wanted or self.loaded[1] < 0:
            version = newest
        else:
            return None
        return None if (attempt, version) in {self.loaded, *self.gone} else (attempt, version)

    def _admissible(self, loaded: tuple[int, int]) -> list[Work]:
        """Pending requests that may run on these weights, most urgent first."""
        attempt, version = loaded
        fits = [
            w
            for w in self.pending
            if w.request.run_attempt == attempt
            and (w.request.version == version if w.request.exact else w.request.version <= version)
        ]
        waits_for_newer = any(
            w.request.run_attempt == attempt and w.request.version > version for w in self.pending
        )
        if waits_for_newer and not any(w.request.exact for w in self.pending) and self.running:
            # Let the engine run empty so that the newer weights can be adopted.
            return []
        return sorted(fits, key=lambda w: (-w.item.priority, w.order))

    def _drop_cancelled(self) -> None:
        for works in (self.pending, self.running):
            for work in [w for w in works if w.item.cancelled]:
                works.remove(work)
                work.item.ack()  # frees its place; nobody waits for it
                ids = [i for i, (owner, _) in self.by_request.items() if owner is work]
                if ids and self.engine is not None:
                    self.engine.abort(ids)
                    for i in ids:
                        del self.by_request[i]

    # Below: called in the worker thread, one at a time.

    def _take_device(self) -> None:
        if self.engine is None:
            import torch

            from actors.backends.hf_engine import HFGenerationEngine

            config = self.config.rollout
            self.engine = HFGenerationEngine(
                self.model,
                max_running=config.max_running,
                max_context_tokens=config.max_context_tokens,
                pad_token=self.pad_token,
                device="cuda" if self.spec.devices[0].startswith("cuda") else "cpu",
                dtype=getattr(torch, config.dtype),
            )
        else:
            self.engine.onload()
        self.offloaded = False

    def _load(self, version: tuple[int, int]) -> None:
        assert self.engine is not None
        with self.weights.borrow(*version, held=self.loaded) as weights:
            try:
                self.engine.load_weights(version[1], weights)
            except WeightsMismatch as error:
                self.log.warning("delta does not fit version=%d: %s", version[1], error)
                self.loaded = NOTHING  # also if the full state is gone by now
            else:
                self.loaded = version
                return
        with self.weights.borrow(*version) as weights:
            self.engine.load_weights(version[1], weights)
        self.loaded = version

    def _advance(self, admissible: list[Work]) -> None:
        """Start what fits, then step until a request is complete, something arrives, or the time slice is over."""
        assert self.engine is not None
        waiting = deque(admissible)
        self._start(waiting)
        until = time.monotonic() + ADVANCE_S
        while self.engine.num_running:
            ended = []
            for generation in self.engine.step():
                work, position = self.by_request.pop(generation.request_id)
                work.results[position] = generation
                ended.append(work)
            # Single samples that ended have nowhere to go yet: only a whole request is worth a stop.
            if any(work.complete for work in ended) or self.wake.is_set() or self.lease.revoking:
                break
            if time.monotonic() > until:
                break
            if ended:
                self._start(waiting)
        for work in [work for work in self.running if work.complete]:
            self.running.remove(work)
            self.finished.append((work, self._actions(work)))

    def _start(self, waiting: deque[Work]) -> None:
        """Give the engine requests while it has room, in order; those that it took leave `waiting`."""
        assert self.engine is not None
        while waiting:
            work = waiting[0]
            if not work.requests:
                self._prepare(work)
            missing = [
                (i, request)
                for i, request in enumerate(work.requests)
                if request is not None and i not in work.results
            ]
            if missing and not self._has_room([request for _, request in missing]):
                return
            for position, request in missing:
                self.by_request[request.request_id] = (work, position)
                self.engine.add(request)
            self.pending.remove(work)
            self.running.append(work)
            waiting.popleft()

    def _has_room(self, requests: list[GenerationRequest]) -> bool:
        """All samples of a turn start together."""
        assert self.engine is not None
        return len(requests) <= self.engine.free_slots and self.engine.can_admit(requests[0])

    def _prepare(self, work: Work) -> None:
        """Make the engine's requests of a turn: prompts are tokenized here and nowhere else."""
        config = self.config.rollout
        for sample in work.request.samples:
            prompt = sample.prompt  # there if another rollout actor handed it back
            if prompt is None:
                prompt = self.policy.encode(sample.history, sample.observation)
            work.prompts.append(prompt)
            context = np.concatenate([sample.history, prompt])
            if len(context) >= config.max_context_tokens:
                if work.request.turn == 0:
                    raise ValueError(
                        f"group {work.request.group}: its prompt has {len(context)} tokens and leaves no room in "
                        f"rollout.max_context_tokens = {config.max_context_tokens}: raise it, or shorten the prompt"
                    )
                work.requests.append(None)
                continue
            self.next_id += 1
            partial = {
                name: getattr(sample, name) for name in SAMPLED if sample.sampled is not None
            }
            request = GenerationRequest(
                request_id=self.next_id,
                context=context,
                max_new_tokens=config.max_new_tokens,
                key=fold(
                    self.config.job.seed,
                    KEY_OF_SAMPLE,
                    work.request.group,
                    sample.sample,
                    work.request.turn,
                ),
                sampling=self.sampling,
                stop_tokens=self.policy.stop_tokens,
                batch=work.order if self.config.job.deterministic else None,
                **partial,
            )
            work.requests.append(request)
            if sample.finish in ("stop", "length"):
                work.results[len(work.requests) - 1] = Generation(
                    request_id=request.request_id,
                    tokens=request.sampled,
                    logprobs=request.sampled_logprobs,
                    versions=request.sampled_versions,
                    finish=sample.finish,
                )

    def _actions(self, work: Work) -> list[Action | None]:
        actions: list[Action | None] = []
        for position, (prompt, request) in enumerate(zip(work.prompts, work.requests, strict=True)):
            if request is None:
                actions.append(None)
                continue
            generation = work.results[position]
            self.counters["tokens"] = self.counters.get("tokens", 0) + len(generation.tokens)
            actions.append(
                Action(
                    prompt=prompt,
                    tokens=generation.tokens,
                    logprobs=generation.logprobs,
                    versions=generation.versions,
                    mask=np.ones(len(generation.tokens), dtype=np.bool_),
                    text=self.policy.decode(generation.tokens),
                    finish=generation.finish,
                    sampling=self.sampling,
                )
            )
        return actions

    def _suspend(self) -> None:
        """Stop all sequences; their requests wait again, to go on from the tokens they have."""
        assert self.engine is not None
        for generation in self.engine.abort():
            work, position = self.by_request.pop(generation.request_id)
            request = work.requests[position]
            assert request is not None
            if request.batch is None:
                work.requests[position] = replace(
                    request,
                    sampled=generation.tokens,
                    sampled_logprobs=generation.logprobs,
                    sampled_versions=generation.versions,
                )
            else:
                work.results.clear()  # a fixed batch starts over, whole
        self.pending.extend(self.running)
        self.running.clear()

    def _with_partial_results(self, work: Work) -> TurnRequest:
        """The request again, with what was sampled: whoever takes it goes on from there."""
        if not work.requests or self.config.job.deterministic:
            return work.request  # nothing begun, or a fixed batch, which starts over
        samples = []
        for position, sample in enumerate(work.request.samples):
            request, generation = work.requests[position], work.results.get(position)
            if generation is not None:
                sample = replace(
                    sample,
                    prompt=work.prompts[position],
                    sampled=generation.tokens,
                    sampled_logprobs=generation.logprobs,
                    sampled_versions=generation.versions,
                    finish=generation.finish,
                )
            elif request is not None:
                sample = replace(
                    sample,
                    prompt=work.prompts[position],
                    **{name: getattr(request, name) for name in SAMPLED},
                    finish=None,
                )
            samples.append(sample)
        return replace(work.request, samples=tuple(samples))
