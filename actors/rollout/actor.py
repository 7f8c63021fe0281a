"""The rollout actor: finds actions for env actors with the newest weights that the policy clock allows.

It holds requests (a turn of a group each, see actors/env/actor.py), feeds them to its sampler as there is room, and
acknowledges each with its actions. It keeps nothing that another rollout actor could not make again: asked to leave, or
parked in mid-generation, it stops its sequences and keeps or hands back the tokens that they have.

New weights come from the trainer's GPUs where both sides are on GPUs of one node, else from the node's host copy.

A request says which version it may be sampled with: `exact` (that version and no other; older versions are still in the
node's host copy), or at least `version`. When weights are swapped is [rollout] adopt: between turns, or in
mid-generation.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import actors.wire  # noqa: F401  registers the payload types
from actors import devices
from actors.actor import Actor
from actors.episodes import Action
from actors.rollout.array_sampler import ArraySampler
from actors.rollout.device_weights import DeviceWeights
from actors.rollout.text_sampler import TextSampler
from actors.rollout.work import Sampler, Work
from channels.channel import Item
from channels.errors import VersionGone, WeightsMismatch
from channels.lifecycle import Introduce
from channels.messages import Message
from channels.weights import WeightsDirectory, WeightsPublished
from channels.weights.device_messages import (
    CUDA_IPC,
    DeviceWeightsRefused,
    DeviceWeightsWelcome,
    WeightsBucket,
)
from channels.work import StageTimes

NOTHING = (-1, -1)  # no version is loaded
PREFETCH = (
    1.25  # requests held beyond what can run, so that the device never waits for a round trip
)


class RolloutActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Build model and tokenizer on the host; device memory is taken under the lease."""
        self.offloaded = False
        self.pending: list[Work] = []
        self.finished: list[tuple[Work, list[Action | None]]] = []  # to be acknowledged
        self.order = 0
        self.newest: WeightsPublished | None = None
        self.on_host = NOTHING  # the newest version that the node's host copy has
        self.on_device: WeightsPublished | None = None  # the version that the trainer's GPUs have
        self.device_weights: DeviceWeights | None = None
        if devices.on_gpu(self.spec):
            self.device_weights = DeviceWeights(self.endpoint, partial(devices.gpu_of, self.spec))
        self.loaded = NOTHING  # (run attempt, version)
        # Of which all weights were loaded: the same, or the base of an adapter.
        self.whole = NOTHING
        self.gone: set[tuple[int, int]] = set()  # versions that the node no longer has
        self.wake = asyncio.Event()
        self.weights = WeightsDirectory(
            Path(self.spec.weights_dir), keep=self.config.job.max_staleness + 2
        )
        self.sampler: Sampler = await self.blocking(self._build)
        capacity = max(2, int(self.sampler.at_a_time * PREFETCH))
        self.requests = self.router.consumer("requests", capacity=capacity)

    def _build(self) -> Sampler:
        device = "cuda" if self.spec.devices[0].startswith("cuda") else "cpu"
        kind = TextSampler if self.config.policy is None else ArraySampler
        return kind(self.config, device=device, counters=self.counters)

    async def run(self) -> None:
        """Generate while there is something to generate."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take(tasks))
            tasks.create_task(self._generate())

    async def leave(self) -> None:
        """Hand every request back with the tokens it has."""
        await self.blocking(self._suspend)  # after the step that may still be under way
        self._deliver()
        for work in self.pending:
            work.item.hand_back(self.sampler.with_progress(work))
        self.requests.close()

    async def park(self, offload: bool) -> int:
        """Stop sequences (they go on later with the tokens they have) and free the device if asked."""
        if not self.sampler.has_device:
            return 0
        await self.blocking(self._suspend)
        if offload:
            await self.blocking(self.sampler.offload)
            self.offloaded = True
        return self.sampler.memory_bytes()

    def on_peer(self, peer: Introduce) -> None:
        """Env actors send requests; a trainer is told that weights may come from its GPUs."""
        if peer.kind == "env":
            self.requests.add_producer(peer.peer)
        elif peer.kind == "trainer" and self.device_weights and not self.device_weights.useless:
            self.endpoint.send(peer.peer, DeviceWeightsWelcome())

    def on_peer_lost(self, peer: Introduce) -> None:
        """Requests of a dead env actor are void."""
        if peer.kind == "env":
            self.requests.remove_producer(peer.peer)
            self.wake.set()
        elif peer.kind == "trainer":
            self.on_device = None
            if self.device_weights is not None:
                self.device_weights.peer_gone(peer.peer)

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        """New weights can be loaded."""
        if isinstance(message, WeightsPublished):
            self._published(sender, message)
        elif isinstance(message, WeightsBucket | DeviceWeightsRefused) and self.device_weights:
            self.device_weights.received(sender, message)

    def _published(self, sender: str, message: WeightsPublished) -> None:
        """A version is on the trainer's GPUs, or in the host copy: as a rule first the one and then the other."""
        if message.variant != CUDA_IPC:
            self.on_host = max(self.on_host, message.version)
        elif self.device_weights is None or self.device_weights.useless:
            return  # the host copy will have it
        else:
            self.on_device = message
        if self.newest is None or message.version > self.newest.version:
            self.newest = message
            if not self.config.job.steps:
                self.loaded = message.version  # nothing is trained: it is what the model has
            self.endpoint.send(sender, StageTimes(seconds=self.time.seconds()))
        self.wake.set()

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
            nothing_to_do = not admissible and not self.sampler.running
            if version is None and (nothing_to_do or self.loaded == NOTHING):
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
        """Wait for the rest of a burst, as long as there is room for it: requests that start together share what is
        computed, and they come in bursts.
        """
        seen = None
        while self.order != seen and len(self.pending) < self.sampler.at_a_time:
            seen = self.order
            await asyncio.sleep(self.sampler.gather_s)

    async def _compute(self, version: tuple[int, int] | None) -> None:
        """One stay on the device: weights if due, new sequences, then tokens until something happens."""
        if not self.sampler.has_device or self.offloaded:
            await self.compute("onload", self.sampler.take_device)
            self.offloaded = False
        if version is not None and not await self._load_version(version):
            return
        await self.compute("generate", self._advance, self._admissible(self.loaded))
        self.lease.check_memory(self.sampler.memory_bytes())
        self._deliver()

    async def _load_version(self, version: tuple[int, int]) -> bool:
        """Swap, between two forward passes. Returns whether there is a version to compute with."""
        offered = self.on_device
        if offered is not None and offered.version == version:
            if await self._load_from_device(version, offered.ranks):
                return True
            if version > self.on_host:
                return False  # it will be, soon; then it is loaded from there
        try:
            await self.compute("load_weights", self._load, version)
        except VersionGone:
            # The job is past it: whoever asks for it withdraws. A newer one is on its way here.
            self.log.warning("weights are gone run_attempt=%d version=%d", *version)
            self.gone.add(version)
            return False
        return True

    async def _load_from_device(self, version: tuple[int, int], num_ranks: int) -> bool:
        ranks = [peer.peer for peer in self.peers_of("trainer")]
        tensors = self.sampler.weights_in_place()
        self.on_device = None  # asked for once
        if self.device_weights is None or len(ranks) != num_ranks or not tensors:
            return False
        self.loaded = self.whole = NOTHING  # while it arrives, and if it does not
        work = partial(self.compute, "load_weights")
        if not await self.device_weights.load(version, ranks, tensors, work):
            return False
        self.sampler.weights_replaced(version[1])
        self.loaded = self.whole = version
        return True

    def _deliver(self) -> None:
        finished, self.finished = self.finished, []
        for work, actions in finished:
            work.watch.cancel()
            work.item.ack(None if work.item.cancelled else tuple(actions))
            self.delivered()

    def _version_to_load(self) -> tuple[int, int] | None:
        """The version to swap to now, or None to go on with the loaded one."""
        found = self._version_wanted()
        offered = None if self.on_device is None else self.on_device.version
        return found if found is None or found <= self.on_host or found == offered else None

    def _version_wanted(self) -> tuple[int, int] | None:
        if self.newest is None:
            return None
        attempt, newest = self.newest.run_attempt, self.newest.policy_version
        if self.sampler.running:
            due = (
                self.config.rollout.adopt == "token"
                and (attempt, newest) > self.loaded
                and not any(w.request.exact for w in self.sampler.running)  # an evaluation's
            )
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
        if (
            waits_for_newer
            and not any(w.request.exact for w in self.pending)
            and self.sampler.running
        ):
            # Let the engine run empty so that the newer weights can be adopted.
            return []
        if self.sampler.running and any(
            w.request.run_attempt == attempt and w.request.exact and w.request.version != version
            for w in self.pending
        ):
            # An evaluation wants other weights: what could go on for ever with these lets the engine run empty.
            fits = [w for w in fits if w.request.exact]
        return sorted(fits, key=lambda w: (-w.item.priority, w.order))

    def _drop_cancelled(self) -> None:
        for work in [w for w in self.sampler.running if w.item.cancelled]:
            self.sampler.drop(work)
            work.item.ack()  # frees its place; nobody waits for it
        for work in [w for w in self.pending if w.item.cancelled]:
            self.pending.remove(work)
            work.item.ack()

    # Below: called in the worker thread, one at a time. What they change stays changed where the loop no longer waits.

    def _advance(self, admissible: list[Work]) -> None:
        advanced = self.sampler.advance(
            admissible, lambda: self.wake.is_set() or self.lease.revoking
        )
        for work in advanced.started:
            self.pending.remove(work)
        self.finished += advanced.finished

    def _suspend(self) -> None:
        """Stop all that runs; the requests wait again, to go on from where they stood."""
        self.pending.extend(self.sampler.suspend())

    def _load(self, version: tuple[int, int]) -> None:
        base = self.weights.base_of(*version)
        if base is None:
            self._load_whole(version)
        else:
            if base != self.whole:
                self._load_whole(base)
            with self.weights.borrow(*version) as adapter:
                assert isinstance(adapter, Mapping)
                self.sampler.load_adapter(version[1], adapter)
            self.loaded = version

    def _load_whole(self, version: tuple[int, int]) -> None:
        """All weights of a version, or what changed since those that the sampler has."""
        with self.weights.borrow(*version, held=self.whole) as weights:
            try:
                self.sampler.load_weights(version[1], weights)
            except WeightsMismatch as error:
                self.log.warning("delta does not fit version=%d: %s", version[1], error)
                self.loaded = self.whole = NOTHING  # also if the full state is gone by now
            else:
                self.loaded = self.whole = version
                return
        with self.weights.borrow(*version) as weights:
            self.sampler.load_weights(version[1], weights)
        self.loaded = self.whole = version
