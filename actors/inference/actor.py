"""The inference actor: what models that are read, not trained, say of finished groups. [inference] computes says what.

Reference log-probs are added on the way: a group comes from an env actor on the channel "groups" and leaves on the
same channel for the trainer, with them in `Turn.computed`. It is acknowledged to its env actor once the trainer holds
it, so one that is in here when the actor dies goes to another actor.

Proximal log-probs and values are those of the policy and critic that a step begins with, which are not there yet while
groups are on their way. So the trainer keeps the group and asks, on the channel "readings", once it has published
that version: the actor loads it from the node's host copy and answers with the acknowledgement. A request whose actor
dies goes to another one.

Groups are read one by one, so their numbers depend on nothing else that is under way. Nothing is kept: the reference
is a file of the run, written before the first step, and a request names its version.
"""

import asyncio
import heapq
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import actors.wire  # noqa: F401  registers the payload types
from actors.actor import Actor
from actors.backends.contract import CRITIC_WEIGHTS, InferenceEngine
from actors.episodes import Group, PolicyReading, ReadingRequest
from channels.channel import Consumer, Item
from channels.errors import VersionGone
from channels.lifecycle import Introduce
from channels.weights import WeightsDirectory
from channels.weights.delta import WeightsDelta
from channels.work import StageTimes

if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

NOTHING = (-1, -1)  # no version is loaded
AHEAD = 2  # requests held: one is read while the next one travels


class InferenceActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Open the channels; the models are built under the first lease, when the trainer has surely begun the run."""
        job, wanted = self.config.job, self.config.inference
        self.engine: InferenceEngine | None = None
        self.offloaded = False
        self.step_seen = -1
        self.loaded = NOTHING  # (run attempt, version)
        self.pending: list[tuple[int, int, int, Item]] = []  # a heap, the most urgent first
        self.order = 0
        self.wake = asyncio.Event()
        self.taken_from: list[Consumer] = []
        if wanted.gives("reference"):
            # Where stages take turns on a device, what one of them makes in its turn has to fit here.
            seats = job.groups_per_step * (job.max_staleness + 1)
            self.incoming = self.router.consumer("groups", capacity=seats)
            self.outgoing = self.router.producer("groups", bound=seats, epoch=self.spec.epoch)
            self.taken_from.append(self.incoming)
        if wanted.reads_policy:
            # Taking turns, a stage that runs empty for a moment may lose the device.
            ahead = job.groups_per_step if job.mode == "collocated" else AHEAD
            self.requests = self.router.consumer("readings", capacity=ahead)
            self.taken_from.append(self.requests)
            self.weights = WeightsDirectory(Path(self.spec.weights_dir))
            self.critic_weights = WeightsDirectory(Path(self.spec.weights_dir) / CRITIC_WEIGHTS)

    async def run(self) -> None:
        """Read what comes, the most urgent first, and pass it on."""
        self.time.enter("wait_groups")
        async with asyncio.TaskGroup() as tasks:
            for consumer in self.taken_from:
                tasks.create_task(self._take(consumer), name=consumer.channel)
            while True:
                item = await self._next()
                if item.cancelled:
                    item.ack()  # frees its place; nobody waits for it
                elif isinstance(item.payload, ReadingRequest):
                    await self._answer(tasks, item)
                else:
                    group = await self._on_device(self._read_reference, item.payload)
                    tasks.create_task(self._deliver(item, group), name=f"group-{group.group}")

    async def leave(self) -> None:
        """Give back what is not finished: another inference actor reads it."""
        for consumer in self.taken_from:
            consumer.close()

    async def park(self, offload: bool) -> int:
        """Move the models to the host if asked."""
        if self.engine is None:
            return 0
        if offload:
            await self.blocking(self.engine.offload)
            self.offloaded = True
        return self.engine.memory_bytes()

    def on_peer(self, peer: Introduce) -> None:
        """Env actors send groups, the trainer's leader takes them, and asks."""
        wanted = self.config.inference
        if peer.kind == "env" and wanted.gives("reference"):
            self.incoming.add_producer(peer.peer)
        elif peer.kind == "trainer" and peer.rank == 0:
            if wanted.gives("reference"):
                self.outgoing.add_consumer(peer.peer)
            if wanted.reads_policy:
                self.requests.add_producer(peer.peer)

    def on_peer_lost(self, peer: Introduce) -> None:
        """What a dead trainer had not acknowledged is offered to the next one; what it had asked is void."""
        wanted = self.config.inference
        if peer.kind == "env" and wanted.gives("reference"):
            self.incoming.remove_producer(peer.peer)
        elif peer.kind == "trainer" and peer.rank == 0:
            if wanted.gives("reference"):
                self.outgoing.remove_consumer(peer.peer)
            if wanted.reads_policy:
                self.requests.remove_producer(peer.peer)

    async def _take(self, consumer: Consumer) -> None:
        while True:
            item = await consumer.get()
            # The trainer waits for what it asks, and does so for the step that is next.
            on_the_way = int(not isinstance(item.payload, ReadingRequest))
            self.order += 1
            heapq.heappush(self.pending, (on_the_way, -item.priority, self.order, item))
            self.wake.set()

    async def _next(self) -> Item:
        while not self.pending:
            self.lease.idle()
            self.wake.clear()
            await self.wake.wait()
        return heapq.heappop(self.pending)[-1]

    async def _on_device(self, read: Any, work: Any) -> Any:
        """One stay on the device."""
        with self.time.measure("wait_lease"):
            await self.lease.__aenter__()
        try:
            if self.engine is None or self.offloaded:
                await self.compute("onload", self._take_device)
            assert self.engine is not None
            found = await read(self.engine, work)
            self.lease.check_memory(self.engine.memory_bytes())
            return found
        finally:
            await self.lease.__aexit__(None, None, None)

    async def _read_reference(self, engine: InferenceEngine, group: Group) -> Group:
        return await self.compute("reference", engine.read_reference, group)

    async def _deliver(self, item: Item, group: Group) -> None:
        await self.outgoing.call(group, priority=item.priority)
        self.delivered()
        item.ack()
        self._tell_times(-item.priority)

    async def _answer(self, tasks: asyncio.TaskGroup, item: Item) -> None:
        request: ReadingRequest = item.payload
        try:
            readings = await self._on_device(self._read_policy, request)
        except VersionGone as error:
            # Only where the job went on without this request: its trainer is gone, or withdraws it.
            self.log.warning("weights are gone: %s", error)
            tasks.create_task(self._until_withdrawn(item), name=f"gone-{request.group.group}")
            return
        item.ack(None if item.cancelled else readings)
        self.delivered()
        self._tell_times(request.version)

    async def _until_withdrawn(self, item: Item) -> None:
        await item.wait_cancelled()
        item.ack()

    async def _read_policy(
        self, engine: InferenceEngine, request: ReadingRequest
    ) -> tuple[PolicyReading, ...]:
        version = (request.run_attempt, request.version)
        if version != self.loaded:
            self.loaded = NOTHING
            await self.compute("load_weights", self._load, engine, version)
            self.loaded = version
        return await self.compute("policy", engine.read_policy, request.group)

    def _tell_times(self, step: int) -> None:
        """Once a step the conductor hears how time was spent."""
        if step > self.step_seen:
            self.step_seen = step
            for conductor in self.peers_of("conductor"):
                self.endpoint.send(conductor.peer, StageTimes(seconds=self.time.seconds()))

    # Below: called in the worker thread.

    def _take_device(self) -> None:
        if self.engine is None:
            self.engine = self._build()
        else:
            self.engine.onload()
        self.offloaded = False

    def _build(self) -> Any:
        from actors.inference.building import build_engine

        return build_engine(self.spec, self.config)

    def _load(self, engine: InferenceEngine, version: tuple[int, int]) -> None:
        lora = self.config.model.lora
        base = self.weights.base_of(*version)
        with ExitStack() as stack:

            def borrow(weights: WeightsDirectory, name: tuple[int, int]) -> "Tensors":
                found = stack.enter_context(weights.borrow(*name))
                assert not isinstance(found, WeightsDelta)  # we named no version to go on from
                return found

            critic: Tensors = {}
            if self.config.inference.gives("values"):
                critic = borrow(self.critic_weights, version)
            engine.load_policy(version[1], borrow(self.weights, base or version), critic)
            if base is not None:
                assert lora is not None
                engine.load_adapter(borrow(self.weights, version), lora.scale)
