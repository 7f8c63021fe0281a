"""The trainer: one replica of one or more data-parallel ranks; rank 0 leads.

The leader holds finished groups until the conductor admits them to a step, shares them out over the ranks by tokens,
and trains on the first micro-batch while later groups are still being sampled (under a shared lease it waits for the
whole step's batch instead: the stages take turns). After a step it publishes the weights as the next policy version;
where an adapter is trained, that alone, on top of version 0, which is the frozen model. And it commits: the state is
copied to the host, every rank writes its part while the training goes on, and checkpoint and manifest become visible by
one rename. One commit is in flight at most.

The other ranks do what the leader says. A rank that dies takes the whole replica with it.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import actors.wire  # noqa: F401  registers the payload types
from actors import devices
from actors.actor import Actor
from actors.backends.contract import CRITIC_WEIGHTS, TrainingEngine
from actors.backends.reference_file import save_reference
from actors.conductor.manifest import Manifest, newest_manifest
from actors.episodes import Group, Segment
from actors.json_lines import line_of
from actors.samples import sample_lines
from actors.trainer import checkpoint
from actors.trainer.commits import Commits
from actors.trainer.device_weights import DeviceWeights
from actors.trainer.host_weights import HostWeights
from actors.trainer.readings import Readings
from channels.channel import Item
from channels.lifecycle import Introduce
from channels.messages import Message
from channels.weights import WeightsDirectory, WeightsPublished
from channels.weights.device_messages import (
    CUDA_IPC,
    DeviceWeightsAsked,
    DeviceWeightsWelcome,
    WeightsBucketTaken,
)
from channels.weights.sharded import outline
from channels.work import (
    Admit,
    BeginRun,
    CommitAndPause,
    Committed,
    Drop,
    GroupReceived,
    Paused,
    RankCommand,
    RankReply,
    StepDone,
    StepRecorded,
    TrainerReady,
)

Command = BeginRun | Admit | CommitAndPause


class TrainerActor(Actor):
    """See the module docstring."""

    async def setup(self) -> None:
        """Build the engine and load the newest commit; without one, warm up and make commit 0."""
        job = self.config.job
        self.leader = self.spec.rank == 0
        self.offloaded = False
        self.has_adapter = self.config.model.lora is not None
        self.engine: TrainingEngine | None = None
        self.commits: Commits | None = None
        self.tasks: asyncio.TaskGroup | None = None  # while it runs
        self.readings: Readings | None = None  # the leader's, where others read the policy
        self.weights = WeightsDirectory(
            Path(self.spec.weights_dir),
            keep=job.max_staleness + 2,
            variant=self.config.trainer.weights,
        )
        self.on_host = self._kinds_on_host()
        self.device_weights: DeviceWeights | None = None
        if devices.on_gpu(self.spec):
            self.device_weights = DeviceWeights(
                self.endpoint,
                partial(devices.gpu_of, self.spec),
                dtype=self.config.rollout.dtype,
                rank=self.spec.rank,
                num_ranks=self.spec.num_ranks,
            )
        self.on_gpus: set[str] = set()  # rollout actors that can take weights from this one's GPUs
        self.commands: asyncio.Queue[Command] = asyncio.Queue()
        self.rank_commands: asyncio.Queue[tuple[RankCommand, Any]] = asyncio.Queue()
        self.replies: dict[tuple[str, int], asyncio.Future[None]] = {}
        self.pool: dict[tuple[int, int], Group] = {}
        # By step; later steps fill while this one is trained.
        self.admitted: dict[int, deque[Admit]] = {}
        self.commit = Manifest(
            step=0, policy_version=0, run_attempt=0
        )  # the last one that was begun
        self.trained: list[int] = []  # since then
        self.recorded = 0  # steps whose metrics the conductor has written
        self.recorded_more = asyncio.Event()
        self.step = 0
        self.run_attempt = -1
        self.paused = False
        self.accumulated = False  # the engine has gradients of the groups before the current chunk
        self.conductor: Introduce | None = None
        self.all_ranks = asyncio.Event()  # the leader knows every other rank
        if self.spec.num_ranks == 1:
            self.all_ranks.set()
        if self.leader:
            self.groups = self.router.consumer(
                "groups", capacity=job.groups_per_step * (job.max_staleness + 1)
            )
            if self.config.inference.reads_policy:
                requests = self.router.producer(
                    "readings", bound=job.groups_per_step, epoch=self.spec.epoch
                )
                self.readings = Readings(requests, self.pool, self._spawn)
        async with self.lease:
            await self.compute("onload", self._take_device)  # all ranks join here
            if not self.leader:
                return
            if newest_manifest(self.run_dir) is None:
                await self._first_commit()
            await self.compute("load", self._load_commit)
        self.lease.idle()

    async def _first_commit(self) -> None:
        if self.config.warmup.steps:
            await self.compute("warmup", self._warm_up, asyncio.get_running_loop())
        await self.compute("commit", self._commit_alone)

    async def run(self) -> None:
        """The leader follows the conductor, the other ranks the leader."""
        self.time.enter("wait_groups")
        async with asyncio.TaskGroup() as self.tasks:
            if not self.leader:
                await self._follow()
            self.tasks.create_task(self._receive())
            self.tasks.create_task(self._lead())

    def on_peer(self, peer: Introduce) -> None:
        """Tell a conductor where the weights stand; take groups from env or inference actors, and ask the latter."""
        if not self.leader:
            return
        if peer.kind == "inference" and self.readings is not None:
            self.readings.producer.add_consumer(peer.peer)
        if peer.kind == "conductor":
            self.conductor = peer
            attempt = max(self.run_attempt, 0)
            self._tell(TrainerReady(epoch=self.spec.epoch, step=self.step, run_attempt=attempt))
        elif peer.kind == self.config.source_of_groups:
            self.groups.add_producer(peer.peer)
        elif peer.kind == "trainer" and len(self.peers_of("trainer")) == self.spec.num_ranks - 1:
            self.all_ranks.set()

    def on_peer_lost(self, peer: Introduce) -> None:
        """What a dead env or inference actor had delivered stays; what one was asked goes to another."""
        self.on_gpus.discard(peer.peer)
        if peer.kind == "rollout" and self.device_weights is not None:
            self.device_weights.peer_gone(peer.peer)
        if peer.kind == "inference" and self.readings is not None:
            self.readings.producer.remove_consumer(peer.peer)
        if self.leader and peer.kind == self.config.source_of_groups:
            self.groups.remove_producer(peer.peer)
        elif self.conductor is not None and peer.peer == self.conductor.peer:
            self.conductor = None

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        """Queue commands in the order they come."""
        match message:
            case BeginRun() | Admit() | CommitAndPause():
                self.commands.put_nowait(message)
                if isinstance(message, Admit) and self.readings is not None:
                    # Not in its turn among the commands: what is under way would hold up the inference actors.
                    self.readings.admit(message.step, (message.group, message.attempt))
            case StepRecorded() if message.run_attempt == self.run_attempt:
                self.recorded = message.step + 1
                self.recorded_more.set()
            case Drop():
                self.pool.pop((message.group, message.attempt), None)
            case RankCommand():
                self.rank_commands.put_nowait((message, payload))
            case DeviceWeightsWelcome():
                self.on_gpus.add(sender)
            case DeviceWeightsAsked() | WeightsBucketTaken() if self.device_weights is not None:
                self.device_weights.received(sender, message)
            case RankReply():
                waiting = self.replies.pop((message.command, message.rank), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(None)

    async def park(self, offload: bool) -> int:
        """Move what is on the device to the host; the leader lets the other ranks do so too."""
        if self.leader and self.spec.num_ranks > 1:
            await self.all_ranks.wait()
            for rank in range(1, self.spec.num_ranks):
                self._tell_rank(rank, "park")
        await self._withdraw()
        if self.engine is None:
            return 0
        if offload:
            await self.blocking(self.engine.offload)
            self.offloaded = True
            self.accumulated = False  # gradients are not kept: the step begins again
        return self.engine.memory_bytes()

    # The leader.

    async def _receive(self) -> None:
        while True:
            item: Item = await self.groups.get()
            group: Group = item.payload
            item.ack()
            key = (group.group, group.attempt)
            if key in self.pool:
                continue  # delivered twice: its env actor died after the first delivery
            self.pool[key] = group
            versions = group.versions
            self._tell(
                GroupReceived(
                    group=group.group,
                    attempt=group.attempt,
                    run_attempt=group.run_attempt,
                    min_version=int(versions.min()) if versions.size else self.step,
                    max_version=int(versions.max()) if versions.size else self.step,
                    tokens=versions.size,
                    rewards=group.rewards.tolist(),
                    info=_mean_info(group.segments),
                )
            )

    async def _lead(self) -> None:
        while True:
            if not self.paused and self.admitted.get(self.step):
                await self._train_step()
            else:
                await self._obey(await self._next_command())

    async def _next_command(self) -> Command:
        with self.time.measure("wait_groups"):
            return await self.commands.get()

    async def _obey(self, command: Command) -> None:
        match command:
            case BeginRun():
                await self._begin_run(command)
            case CommitAndPause():
                self.paused = True
                if self.readings is not None:
                    self.readings.reset()
                assert self.commits is not None
                if self.commit.step != self.step:
                    await self._begin_commit()
                await self._until_committed()
                self._tell(Paused(run_attempt=self.run_attempt, step=self.step))
            case Admit():
                self.admitted.setdefault(command.step, deque()).append(command)

    async def _next_admit(self) -> Admit | None:
        """The next group of the current step; None when another command ended the step's run."""
        while not self.admitted.get(self.step):
            command = await self._next_command()
            await self._obey(command)
            if not isinstance(command, Admit):
                return None
        return self.admitted[self.step].popleft()

    async def _begin_run(self, command: BeginRun) -> None:
        assert command.step == self.step
        self.run_attempt = command.run_attempt
        self.recorded = self.step
        self.paused = False
        if self.readings is not None:
            self.readings.reset()
        self.pool.clear()
        self.admitted.clear()
        await self.all_ranks.wait()
        async with self.lease:
            await self._ensure_device()
            await self._command_ranks("begin")
            if self.has_adapter and self.step:
                await self._write_version("policy", 0)  # what the others go on top of
            await self.compute("publish", self._publish_older)
            await self._publish()
        self.lease.idle()

    async def _train_step(self) -> None:
        """Train on the groups of one step as they are admitted."""
        began = time.monotonic()
        share_before = self.time.seconds()
        budget = self.config.trainer.micro_batch_tokens * self.spec.num_ranks
        self.accumulated = False
        groups: list[Group] = []
        batch: list[Group] = []
        tokens = 0  # of the batch
        while True:
            admit = await self._next_admit()
            if admit is None:
                return  # the run was rolled back
            group = self.pool.pop((admit.group, admit.attempt))
            groups.append(group)
            batch.append(group)
            # Chunks are cut by tokens alone, never by arrival times: the same order gives the same chunks. One is cut
            # where another group like the last would not fit, as its rest would make a small, slow micro-batch.
            size = _context_tokens(group)
            tokens += size
            full = tokens + size > budget
            if admit.last:
                break
            # Taking turns, the device is taken once the whole batch is there.
            if full and not self.lease.shared:
                await self._collect(groups, batch)
                async with self._on_device():
                    await self._accumulate(batch if self.accumulated else groups)
                batch, tokens = [], 0
        self.admitted.pop(self.step)
        await self._collect(groups, batch)
        # One stay on the device: an offload between the gradients and the update would forget the gradients.
        variant: str | None = None
        async with self._on_device():
            await self._accumulate(batch if self.accumulated else groups)
            metrics = await self._finish_step(groups)
            self.step += 1
            finite = all(math.isfinite(metrics.get(k, 0.0)) for k in ("loss", "grad_norm"))
            if finite:
                self.trained.extend(group.group for group in groups)
                publishing = time.monotonic()
                variant, metrics["weights_bytes"] = await self._publish()
                metrics["seconds_publish"] = round(time.monotonic() - publishing, 4)
        if not finite:
            self.paused = (
                True  # the conductor ends the job; such weights are neither published nor committed
            )
        share = self.time.seconds()
        metrics["seconds_train"] = round(share.get("work", 0) - share_before.get("work", 0), 4)
        metrics["seconds_step"] = round(time.monotonic() - began, 4)
        self._tell(
            StepDone(
                run_attempt=self.run_attempt,
                step=self.step - 1,
                policy_version=self.step,
                metrics=metrics,
                weights_variant=variant,
            )
        )
        self.delivered()
        await self.blocking(self._write_samples, groups)
        if finite and admit.commit:
            await self._begin_commit()
        self.lease.idle()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        assert self.tasks is not None
        return self.tasks.create_task(work)

    async def _collect(self, groups: list[Group], batch: list[Group]) -> None:
        """Put what inference actors read into `batch`, the end of `groups`. Off the device, as they may need it."""
        if self.readings is None or not batch:
            return
        self.lease.idle()
        with self.time.measure("wait_inference"):
            batch[:] = await self.readings.collect(batch)
        groups[-len(batch) :] = batch

    async def _accumulate(self, batch: list[Group]) -> None:
        begin, self.accumulated = not self.accumulated, True
        shares = share_out(batch, self.spec.num_ranks)
        for rank, share in enumerate(shares):
            if rank:
                self._tell_rank(rank, "accumulate", (begin, share))
        await self.compute("accumulate", self._accumulate_now, shares[0], begin)

    def _accumulate_now(self, groups: Sequence[Group], begin: bool) -> None:
        assert self.engine is not None
        if begin:
            self.engine.begin_step()
        self.engine.accumulate(groups)

    async def _finish_step(self, groups: list[Group]) -> dict[str, float]:
        assert self.engine is not None
        ranks = self._command_ranks("finish")
        await self._withdraw()
        metrics = await self.compute("update", self.engine.finish_step)
        await ranks
        self.lease.check_memory(self.engine.memory_bytes())
        return metrics

    async def _publish(self) -> tuple[str, int]:
        """Show the version that the engine has; returns how, and the bytes that a receiver gets which has the last one.

        First on the GPUs, where receivers can reach them, for they are waiting; then in the node's host copy, which
        serves all others: who joins late or comes back to an older version, also when the trainer is parked or dead.
        """
        offered = await self._offer()
        published = await self._publish_on_host()
        if self.readings is not None:
            self.readings.published(self.run_attempt, self.step)
        if offered is not None:
            return offered.variant, offered.variant_bytes
        return published.variant, published.variant_bytes

    async def _offer(self) -> WeightsPublished | None:
        """On the GPUs of all ranks, until the next update. Stages that take turns on them have no use for it, and an
        adapter is too small to be worth the way."""
        if not self.on_gpus or self.has_adapter or self.lease.shared or not self._has_offers:
            return None
        ranks = self._command_ranks("offer")
        size_bytes = await self.compute("publish", self._offer_parts)
        await ranks
        if not self._has_offers:
            return None
        published = WeightsPublished(
            run_attempt=self.run_attempt,
            policy_version=self.step,
            path="",
            size_bytes=size_bytes,
            variant=CUDA_IPC,
            variant_bytes=size_bytes,
            ranks=self.spec.num_ranks,
        )
        self._tell(published)
        return published

    @property
    def _has_offers(self) -> bool:
        return self.device_weights is not None and not self.device_weights.useless

    async def _withdraw(self) -> None:
        """The weights are about to change, or to leave the device."""
        if self.device_weights is not None:
            await self.device_weights.withdraw()

    async def _publish_on_host(self) -> WeightsPublished:
        """The version that the engine has, of each kind. The policy, or its adapter, is last, and told."""
        of_adapter = self.has_adapter and self.step > 0
        if "critic" in self.on_host:
            await self._write_version("critic", self.step)
        published = await self._write_version("adapter" if of_adapter else "policy", self.step)
        self._tell(published)
        return published

    async def _write_version(self, kind: str, version: int) -> WeightsPublished:
        """Every rank writes its parts into one file, shown when all have."""
        weights = self.on_host[kind]
        base = (self.run_attempt, 0) if kind == "adapter" else None
        publication, tensors = await self.compute(
            "publish", weights.begin, (self.run_attempt, version), base
        )
        try:
            ranks = self._command_ranks("publish", (kind, str(publication.path)))
            await self.compute("publish", weights.write, publication, tensors)
            await ranks
            published: WeightsPublished = await self.compute("publish", publication.finish)
        finally:
            publication.drop()
        return published

    def _kinds_on_host(self) -> dict[str, HostWeights]:
        ranks = {"rank": self.spec.rank, "num_ranks": self.spec.num_ranks}
        dtype = self.config.rollout.dtype
        kinds: dict[str, HostWeights] = {}
        if self.config.inference.gives("values"):
            folder = Path(self.spec.weights_dir) / CRITIC_WEIGHTS
            kinds["critic"] = HostWeights(
                WeightsDirectory(folder),
                lambda: self._engine.critic_weights(),
                dtype=None,
                **ranks,
            )
        kinds["policy"] = HostWeights(
            self.weights, lambda: self._engine.weights(), dtype=dtype, **ranks
        )
        if self.has_adapter:
            kinds["adapter"] = HostWeights(
                self.weights, lambda: iter(self._engine.adapter().items()), dtype=None, **ranks
            )
        return kinds

    @property
    def _engine(self) -> TrainingEngine:
        assert self.engine is not None
        return self.engine

    async def _begin_commit(self) -> None:
        """Copy the state of this step to the host; it is written while the training goes on."""
        assert self.commits is not None
        assert self.tasks is not None
        await self._until_committed()
        self.commit = Manifest(
            step=self.step,
            policy_version=self.step,
            run_attempt=self.run_attempt,
            groups=self.commit.groups.union(self.trained),
        )
        self.trained = []
        for rank in range(1, self.spec.num_ranks):
            self._tell_rank(rank, "commit")
        async with self._on_device():
            await self.compute("stage", self._stage, self.step)
        self.commits.start(self.tasks, self._finish_commit(self.commit))

    async def _until_committed(self) -> None:
        assert self.commits is not None
        if self.commits.in_flight:
            self.lease.idle()  # an evaluation may have to be recorded first, on the same devices
            with self.time.measure("wait_commit"):
                await self.commits.settled()

    async def _finish_commit(self, manifest: Manifest) -> None:
        assert self.commits is not None
        began = time.monotonic()
        await self.commits.write()
        # A committed step is never taken again: its line of metrics has to be there before.
        while self.recorded < manifest.step:
            self.recorded_more.clear()
            await self.recorded_more.wait()
        await self.commits.commit(manifest)
        self._tell(
            Committed(
                run_attempt=manifest.run_attempt,
                step=manifest.step,
                policy_version=manifest.policy_version,
                seconds=time.monotonic() - began,
            )
        )

    def _tell(self, message: Message) -> None:
        # A conductor that is gone takes the job back to the last commit when it returns: nothing to tell.
        if self.conductor is not None:
            self.endpoint.send(self.conductor.peer, message)

    def _tell_rank(self, rank: int, command: str, payload: Any = None) -> asyncio.Future[None]:
        peers = [p for p in self.peers_of("trainer") if p.rank == rank]
        assert peers, f"rank {rank} was not introduced"
        reply: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.replies[command, rank] = reply
        message = RankCommand(command=command, run_attempt=self.run_attempt, step=self.step)
        self.endpoint.send(peers[0].peer, message, payload)
        return reply

    def _command_ranks(self, command: str, payload: Any = None) -> "asyncio.Future[list[None]]":
        """Send a command to all other ranks now; the future is done when all have carried it out."""
        return asyncio.gather(
            *(self._tell_rank(rank, command, payload) for rank in range(1, self.spec.num_ranks))
        )

    # Every rank.

    async def _follow(self) -> None:
        leader: Introduce | None = None
        while True:
            with self.time.measure("wait_leader"):
                command, payload = await self.rank_commands.get()
            if command.command == "park":
                self.lease.let_go()
                continue
            async with self._on_device():
                assert self.engine is not None
                match command.command:
                    case "begin":
                        await self._withdraw()
                        await self.compute("load", self._load_commit)
                    case "accumulate":
                        begin, groups = payload
                        await self.compute("accumulate", self._accumulate_now, groups, begin)
                    case "finish":
                        await self._withdraw()
                        await self.compute("update", self.engine.finish_step)
                        self.delivered()
                    case "offer":
                        self.run_attempt, self.step = command.run_attempt, command.step
                        await self.compute("publish", self._offer_parts)
                    case "publish":
                        kind, path = payload
                        await self.compute("publish", self.on_host[kind].write_file, Path(path))
                    case "commit":
                        await self._stage_and_write(command.step)
            leader = next((p for p in self.peers_of("trainer") if p.rank == 0), leader)
            if leader is not None:
                reply = RankReply(rank=self.spec.rank, command=command.command, step=command.step)
                self.endpoint.send(leader.peer, reply)

    async def _stage_and_write(self, step: int) -> None:
        assert self.commits is not None
        assert self.tasks is not None
        await self.commits.settled()
        await self.compute("stage", self._stage, step)
        self.commits.start(self.tasks, self.commits.write())

    def close(self) -> None:
        """Also the threads that write commits and send weights."""
        super().close()
        if self.commits is not None:
            self.commits.close()
        if self.device_weights is not None:
            self.device_weights.close()

    def _on_device(self) -> "_OnDevice":
        return _OnDevice(self)

    async def _ensure_device(self) -> None:
        if self.engine is None or self.offloaded:
            await self.compute("onload", self._take_device)

    # Below: called in the worker thread.

    def _take_device(self) -> None:
        if self.engine is None:
            self._build()
        elif self.offloaded:
            self.engine.onload()
        self.offloaded = False

    def _build(self) -> None:
        from actors.trainer.building import build_checkpoint_writer, build_engine

        self.engine = build_engine(self.spec, self.config)
        writer = build_checkpoint_writer(self.spec, self.config)
        self.commits = Commits(writer, wait=self.inline)

    def _warm_up(self, loop: asyncio.AbstractEventLoop) -> None:
        from actors.backends.hf_trainer import HFTrainingEngine
        from actors.trainer.building import warm_up

        def progress(**data: Any) -> None:
            loop.call_soon_threadsafe(lambda: self.event("warmup", **data))

        assert isinstance(self.engine, HFTrainingEngine)
        warm_up(self.engine, self.config, Path(self.spec.cache_dir), progress)

    def _load_commit(self) -> None:
        assert self.engine is not None
        self.commit = checkpoint.load(self.run_dir, self.engine)
        self.trained = []
        self.step = self.commit.step

    def _commit_alone(self) -> None:
        """The first commit: the other ranks do not work yet."""
        assert self.engine is not None
        assert self.commits is not None
        writer = self.commits.writer
        state = self.engine.state()
        # What checkpoints of an adapter do not hold is in the model's folder, unless the job made it.
        made = self.config.model.path is None or self.config.warmup.steps
        if self.config.inference.gives("reference") or (self.has_adapter and made):
            # Before it counts that there is a commit.
            save_reference(self.run_dir, dict(self.engine.weights()))
        writer.stage(self.commit.step, state)
        writer.write(alone=True)
        writer.commit(self.commit)

    def _stage(self, step: int) -> None:
        assert self.engine is not None
        assert self.commits is not None
        # What the next groups of a deterministic job will be sampled with, wherever it goes on.
        lag = self.config.job.max_staleness if self.config.job.deterministic and self.leader else 0
        older = range(max(1 if self.has_adapter else 0, step - lag), step)  # the base is at hand
        self.commits.writer.stage(
            step, self.engine.state(), {v: self.weights.load(self.run_attempt, v) for v in older}
        )

    def _offer_parts(self) -> int:
        """Offer this rank's parts on its GPU; returns the bytes of the whole version."""
        assert self.engine is not None
        tensors = dict(self.engine.weights())
        made = outline(tensors, self.config.rollout.dtype)
        if self.device_weights is not None:
            self.device_weights.offer((self.run_attempt, self.step), tensors)
        return sum(tensor.nbytes for tensor in made.values())

    def _publish_older(self) -> None:
        """Put the commit's older policies where rollout actors look for them."""
        base = (self.run_attempt, 0) if self.has_adapter else None
        for version, tensors in checkpoint.load_policies(self.run_dir, self.step).items():
            self.weights.publish(self.run_attempt, version, tensors.items(), base=base)

    def _write_samples(self, groups: Sequence[Group]) -> None:
        count = self.config.metrics.samples_per_step
        lines = [
            line
            for group in groups[:count]
            for segment in group.segments[:1]
            for line in sample_lines(
                segment, step=self.step - 1, attempt=self.run_attempt, group=group.group
            )
        ]
        if lines:
            with (self.run_dir / "samples.jsonl").open("ab") as file:
                file.write(b"".join(line_of(line) for line in lines))


class _OnDevice:
    """`async with`: the lease is held and the engine is on the device."""

    def __init__(self, actor: TrainerActor) -> None:
        self._actor = actor

    async def __aenter__(self) -> None:
        with self._actor.time.measure("wait_lease"):
            await self._actor.lease.__aenter__()
        await self._actor._ensure_device()

    async def __aexit__(self, *error: Any) -> None:
        await self._actor.lease.__aexit__(None, None, None)


def share_out(groups: Sequence[Group], num_ranks: int) -> list[list[Group]]:
    """Give each group to the rank with the fewest tokens so far (the lowest on ties); keeps the order."""
    shares: list[list[Group]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for group in groups:
        rank = loads.index(min(loads))
        shares[rank].append(group)
        loads[rank] += _context_tokens(group)
    return shares


def _context_tokens(group: Group) -> int:
    return sum(
        len(turn.action.prompt) + turn.action.num_units
        for segment in group.segments
        for turn in segment.turns
    )


def _mean_info(segments: Sequence[Segment]) -> dict[str, float]:
    """Means over the segments of every number in their info."""
    values: dict[str, list[float]] = {}
    for segment in segments:
        for key, value in segment.info.items():
            if isinstance(value, int | float):
                values.setdefault(key, []).append(float(value))
    return {key: sum(v) / len(v) for key, v in values.items()}
