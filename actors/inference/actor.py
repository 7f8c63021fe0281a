"""The inference actor: adds to finished groups what a frozen model says of them, on their way to the trainer.

A group comes from an env actor on the channel "groups" and leaves on the same channel for the trainer, with the
reference policy's log-probs in `Turn.computed`. It is acknowledged to its env actor once the trainer holds it, so one
that is in here when the actor dies goes to another actor. Groups are read one by one, so their numbers depend on
nothing else that is under way. Nothing is kept: the reference is a file of the run, written before the first step.
"""

import asyncio
from typing import Any

import actors.wire  # noqa: F401  registers the payload types
from actors.actor import Actor
from actors.backends.contract import ReferenceEngine
from actors.episodes import Group
from channels.channel import Item
from channels.lifecycle import Introduce
from channels.work import StageTimes


class InferenceActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Open the channels; the model is built under the first lease, when the trainer has surely written it."""
        job = self.config.job
        self.engine: ReferenceEngine | None = None
        self.offloaded = False
        self.step_seen = -1
        # Where stages take turns on a device, what one of them makes in its turn has to fit here.
        seats = job.groups_per_step * (job.max_staleness + 1)
        self.incoming = self.router.consumer("groups", capacity=seats)
        self.outgoing = self.router.producer("groups", bound=seats, epoch=self.spec.epoch)

    async def run(self) -> None:
        """Read what comes, the most urgent first, and pass it on."""
        self.time.enter("wait_groups")
        async with asyncio.TaskGroup() as tasks:
            while True:
                item = self.incoming.get_nowait()
                if item is None:
                    self.lease.idle()
                    item = await self.incoming.get()
                if item.cancelled:
                    item.ack()  # frees its place; nobody waits for it
                    continue
                group = await self._read(item.payload)
                tasks.create_task(self._deliver(item, group), name=f"group-{group.group}")

    async def leave(self) -> None:
        """Give back what has not reached the trainer: another inference actor reads it."""
        self.incoming.close()

    async def park(self, offload: bool) -> int:
        """Move the model to the host if asked."""
        if self.engine is None:
            return 0
        if offload:
            await self.blocking(self.engine.offload)
            self.offloaded = True
        return self.engine.memory_bytes()

    def on_peer(self, peer: Introduce) -> None:
        """Env actors send groups, the trainer's leader takes them."""
        if peer.kind == "env":
            self.incoming.add_producer(peer.peer)
        elif peer.kind == "trainer" and peer.rank == 0:
            self.outgoing.add_consumer(peer.peer)

    def on_peer_lost(self, peer: Introduce) -> None:
        """What a dead trainer had not acknowledged is offered to the next one."""
        if peer.kind == "env":
            self.incoming.remove_producer(peer.peer)
        elif peer.kind == "trainer" and peer.rank == 0:
            self.outgoing.remove_consumer(peer.peer)

    async def _read(self, group: Group) -> Group:
        with self.time.measure("wait_lease"):
            await self.lease.__aenter__()
        try:
            if self.engine is None or self.offloaded:
                await self.compute("onload", self._take_device)
            assert self.engine is not None
            read = await self.compute("reference", self.engine.read, group)
            self.lease.check_memory(self.engine.memory_bytes())
            return read
        finally:
            await self.lease.__aexit__(None, None, None)

    async def _deliver(self, item: Item, group: Group) -> None:
        await self.outgoing.call(group, priority=item.priority)
        self.delivered()
        item.ack()
        self._tell_times(-item.priority)

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
