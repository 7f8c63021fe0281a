"""The conductor: one per job. Owns what is issued, the policy clock and the ledger; touches no tensor.

It tells env actors which groups to play, admits finished groups to steps, passes new policy versions on to rollout
actors, has policies evaluated, and keeps the ledger in line with the trainer's commits. A trainer that comes back after
a crash takes the job back to its last commit: a new run attempt begins, and whatever the commit does not contain is
issued again.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from actors.actor import Actor
from actors.conductor.batches import Batch, Batches, Decision
from actors.conductor.config import evaluates
from actors.conductor.evaluating import Evaluated, Evaluator, recorded_evaluations
from actors.conductor.filtering import GroupFilter
from actors.conductor.guards import Guards
from actors.conductor.issuing import Issue, Issuer
from actors.conductor.ledger import Ledger
from actors.conductor.manifest import newest_manifest
from actors.conductor.metrics import MetricsWriter
from actors.conductor.progress import ProgressWatch
from actors.conductor.step_line import StageSeconds, step_line
from actors.errors import ActorError
from actors.randomness import fold
from channels.lifecycle import FLOWD, HandedOver, HandOver, Introduce, JobFinished
from channels.messages import Message
from channels.weights import WeightsPublished
from channels.work import (
    Admit,
    BeginRun,
    CommitAndPause,
    Committed,
    Drop,
    GroupReceived,
    InCall,
    Paused,
    StageTimes,
    StepDone,
    StepRecorded,
    TrainerReady,
)

SEED_OF_GROUP = 1  # purpose of the key that makes a group's seed


class ConductorActor(Actor):
    """See the module docstring. Everything it decides is in `issuing`, `batches`, `filtering` and `guards`."""

    async def setup(self) -> None:
        """Open the ledger and bring it in line with the newest manifest."""
        config = self.config.job
        self.issuer = Issuer(
            groups_per_step=config.groups_per_step,
            max_staleness=config.max_staleness,
            steps=config.steps,
        )
        self.batches = Batches(
            self.issuer,
            GroupFilter(self.config.algorithm, config.groups_per_step),
            deterministic=config.deterministic,
        )
        self.tickets = self.router.producer(
            "tickets",
            # Twice the seats: a new group may be issued before the ticket of the filtered one is acknowledged.
            bound=2 * config.groups_per_step * (config.max_staleness + 1),
            epoch=self.spec.epoch,
        )
        self.guards = Guards(self.config.guards)
        self.ledger = Ledger(self.run_dir / "ledger.sqlite")
        self.metrics = await self.blocking(
            MetricsWriter, self.run_dir, tensorboard=self.config.metrics.tensorboard
        )
        self.evaluations = self.router.producer(
            "evaluations", bound=4 * self.config.eval.problems, epoch=self.spec.epoch
        )
        self.progress = ProgressWatch(self.config.guards.no_progress_s, self)
        self.evaluator = Evaluator(
            self.config,
            self.run_dir,
            self.evaluations,
            self.metrics,
            done=lambda evaluated: self.inbox.put_nowait(("", evaluated)),
            progressed=self.progress.made,
        )
        self.trainer: Introduce | None = None
        self.newest: WeightsPublished | None = None
        self.run_attempt = -1  # the first BeginRun makes it 0, or one more than the ledger knows
        self.rewards: list[float] = []  # mean reward of each step, for stop_reward
        self.ended: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
        self.finishing: tuple[str, str] | None = None  # waits for the last commit
        self.committed_step = -1
        self.unsaid: StepRecorded | None = None  # that the trainer was not told yet
        self.handing_over: str | None = None
        self.handed_over = False
        self.step_began = time.monotonic()
        self.stage_seconds = StageSeconds()
        self.inbox: asyncio.Queue[tuple[str, Message | Evaluated]] = asyncio.Queue()

    async def run(self) -> None:
        """Work through messages in the order they came, until the job is over."""
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(self._watch_progress()),
                tasks.create_task(self.evaluator.run()),
                tasks.create_task(self._work()),
            ]
            if not self.config.job.steps:
                await self._only_evaluate()
            state, reason = await self.ended
            for task in beside:
                task.cancel()
        await self.blocking(self.ledger.cancel_open)  # after what the worker may still be writing
        self.endpoint.send(FLOWD, JobFinished(job=self.spec.job, state=state, reason=reason))

    async def leave(self) -> None:
        """Nothing is in flight here that the ledger does not know."""
        await self.blocking(self._close_files)

    def _close_files(self) -> None:
        self.metrics.close()
        self.ledger.close()

    def on_peer(self, peer: Introduce) -> None:
        """Env actors take tickets; a late rollout actor gets the newest weights; a trainer will say where it stands."""
        if peer.kind == "env":
            self.tickets.add_consumer(peer.peer)
            if evaluates(self.config.job, self.config.eval):
                self.evaluations.add_consumer(peer.peer)
        elif peer.kind == "rollout" and self.newest is not None:
            self.endpoint.send(peer.peer, self.newest)

    def on_peer_lost(self, peer: Introduce) -> None:
        """Tickets of a dead env actor go to another; a dead trainer's groups wait for its successor."""
        if peer.kind == "env":
            self.tickets.remove_consumer(peer.peer)
            self.evaluations.remove_consumer(peer.peer)
        elif self.trainer is not None and peer.peer == self.trainer.peer:
            self.trainer = None

    def on_message(self, sender: str, message: Message, payload: Any) -> None:
        """Queue: the ledger is written off the loop, and order matters."""
        if isinstance(message, InCall):
            self.progress.answered(sender, message)  # asked for while the queue may not move
            return
        self.inbox.put_nowait((sender, message))

    async def _work(self) -> None:
        while not self.ended.done():
            with self.time.measure("wait_groups"):
                sender, message = await self.inbox.get()
            match message:
                case TrainerReady():
                    await self._begin_run(sender, message)
                case WeightsPublished():
                    await self._published(message)
                case GroupReceived():
                    await self._group_received(message)
                case StepDone():
                    await self._step_done(message)
                case Committed():
                    await self._committed(message)
                case Paused():
                    self._paused(message)
                case Evaluated():
                    await self._evaluated(message)
                case StageTimes():
                    self.stage_seconds.told[sender] = message.seconds
                case HandOver():
                    self.handing_over, self.handed_over = message.replica, False
                    if self.finishing is None and not self.issuer.has_arrived(self.issuer.version):
                        self._pause_trainer()

    async def _begin_run(self, sender: str, ready: TrainerReady) -> None:
        """A trainer stands at a commit: go on from there."""
        trainer = self.peers.get(sender)
        if trainer is None or trainer.epoch != ready.epoch:
            return  # it died since; its successor says where it stands itself
        # Only now: what the one before still had queued here is not for this one.
        self.trainer = trainer
        manifest = newest_manifest(self.run_dir)
        # The trainer has just loaded that commit; another step would mean that two trainers write here.
        assert manifest is not None
        assert manifest.step == ready.step
        begun_before = self.run_attempt >= 0
        self.run_attempt = max(self.run_attempt, self.ledger.last_run_attempt()) + 1
        rolled_back = self.ledger.reconcile(manifest, self.run_attempt)
        self.batches.clear()
        self.tickets.cancel(lambda pending: True)
        if begun_before:
            del self.rewards[len(self.rewards) - (self.issuer.version - ready.step) :]
        self.committed_step, self.unsaid = ready.step, None
        recorded = await self.blocking(recorded_evaluations, self.run_dir)
        self.evaluator.begin_run(self.run_attempt, recorded)
        await self.blocking(self.evaluator.committed, ready.step)
        self.issuer.restore(ready.step, self.ledger.next_group(), self.ledger.open_groups())
        if begun_before or rolled_back:
            self.event(
                "rollback",
                step=ready.step,
                attempt=self.run_attempt,
                groups=len(rolled_back),
                reason=(
                    f"the trainer starts from the commit of step {ready.step}; "
                    f"{len(rolled_back)} groups that it does not contain are played again"
                ),
            )
        if self.handing_over is not None and not self.handed_over:
            # The one that was to hand over died; this one can be replaced from where it stands.
            self._tell_handed_over()
        self.handing_over = None
        self.finishing = None  # the steps that were to be the last may have been rolled back
        self.newest = None
        if ready.step >= self.config.job.steps:
            self.finishing = ("done", f"all {self.config.job.steps} steps were already trained")
            if not self.evaluator.is_due(ready.step):
                self._end(*self.finishing)
                return
        self._tell_trainer(BeginRun(run_attempt=self.run_attempt, step=ready.step))
        self.step_began = time.monotonic()
        self.progress.made()

    async def _published(self, message: WeightsPublished) -> None:
        if message.run_attempt != self.run_attempt:
            return
        first = self.newest is None
        self.newest = message
        for rollout in self.peers_of("rollout"):
            self.endpoint.send(rollout.peer, message)
        if self.evaluator.is_due(message.policy_version):
            self.evaluator.start(message.policy_version)
        if first:
            await self._issue()

    async def _issue(self) -> None:
        """Issue what the policy clock allows; while handing over, only to complete a step that has begun."""
        if self.finishing is not None:
            return
        if self.handing_over is not None and not self.issuer.has_arrived(self.issuer.version):
            return
        evaluated = self.evaluator.oldest
        if evaluated is not None and self.issuer.version > evaluated:
            return  # its weights would be gone before it is complete
        issues = self.issuer.due()
        if not issues:
            return
        attempts = self.ledger.issue_many(
            [(issue.group, self._seed(issue.group)) for issue in issues], self.run_attempt
        )
        for issue, attempt in zip(issues, attempts, strict=True):
            await self.tickets.put(self._ticket(issue, attempt), priority=-issue.step)

    def _seed(self, group: int) -> int:
        return fold(self.config.job.seed, SEED_OF_GROUP, group) >> 1

    def _ticket(self, issue: Issue, attempt: int) -> dict[str, Any]:
        # Deterministic jobs sample with one exact version: the oldest one that the bound allows.
        exact = self.config.job.deterministic or self.config.rollout.adopt == "group"
        version = issue.version
        if self.config.job.deterministic:
            version = max(0, issue.step - self.config.job.max_staleness)
        return {
            "group": issue.group,
            "attempt": attempt,
            "run_attempt": self.run_attempt,
            "seed": self._seed(issue.group),
            "step": issue.step,
            "version": version,
            "exact": exact,
            "group_size": self.config.rollout.group_size,
        }

    async def _group_received(self, message: GroupReceived) -> None:
        step = None
        if message.run_attempt == self.run_attempt and self.ledger.complete(
            message.group,
            message.attempt,
            min_version=message.min_version,
            max_version=message.max_version,
            reward=sum(message.rewards) / max(len(message.rewards), 1),
            tokens=message.tokens,
        ):
            step = self.issuer.complete(message.group)
        if step is None:
            self._tell_trainer(Drop(group=message.group, attempt=message.attempt))
            return
        try:
            decision = self.batches.arrived(message, step)
        except ActorError as error:
            self._end("failed", str(error))
        else:
            await self._carry_out(decision, step)

    async def _carry_out(self, decision: Decision, step: int) -> None:
        if decision.admitted:
            self._admit(decision.admitted, step)
        if not decision.filtered:
            return
        for group in decision.filtered:
            self.ledger.discard(group.group, group.attempt, "filtered", step=step)
            self._tell_trainer(Drop(group=group.group, attempt=group.attempt))
        out = {group.group for group in decision.filtered}
        # A ticket whose env actor died after delivering is played for nothing.
        self.tickets.cancel(lambda pending: pending.payload["group"] in out)
        if self.handing_over is not None and not self.issuer.has_arrived(self.issuer.version):
            self._pause_trainer()  # nothing is left of the step that it was to complete before
        else:
            await self._issue()

    def _admit(self, groups: Sequence[GroupReceived], step: int) -> None:
        """Let the trainer have groups of a step; the last one closes the step."""
        every = self.config.checkpoint.every_steps
        commit = (step + 1) % every == 0
        full = self.issuer.is_full(step)
        for order, group in enumerate(groups):
            self._tell_trainer(
                Admit(
                    group=group.group,
                    attempt=group.attempt,
                    step=step,
                    order=order,
                    last=full and group is groups[-1],
                    commit=commit,
                )
            )

    async def _step_done(self, message: StepDone) -> None:
        if message.run_attempt != self.run_attempt:
            return
        groups = self.issuer.advance(message.policy_version)
        batch = self.batches.close(message.step)
        self.ledger.train(groups, message.step)
        # A ticket of a trained group (its env actor died after delivering) is played for nothing.
        self.tickets.cancel(lambda pending: pending.payload["step"] <= message.step)
        self.progress.made()
        line = self._line(message, batch)
        self.rewards.append(line["reward_mean"])
        await self.blocking(self.metrics.write, line)
        self.unsaid = StepRecorded(run_attempt=self.run_attempt, step=message.step)
        self._tell_recorded()
        self.event("step", **line)
        rewards = [reward for group in batch.sampled for reward in group.rewards]
        stopped = self.guards.check(message.metrics, rewards)
        if stopped is not None:
            self._end("failed", stopped)
            return
        in_vain = self.batches.in_vain(message.step, batch)
        job = self.config.job
        window = self.rewards[-job.stop_window :]
        if in_vain is not None:
            self._finish("failed", in_vain)
        elif self.issuer.version >= job.steps:
            self._finish("done", f"all {job.steps} steps were trained")
        elif (
            job.stop_reward is not None
            and len(window) == job.stop_window
            and sum(window) / len(window) >= job.stop_reward
        ):
            self._finish(
                "done",
                f"mean reward of the last {job.stop_window} steps is {sum(window) / len(window):.3f}, "
                f"stop_reward = {job.stop_reward}",
            )
        elif self.handing_over is not None:
            self._pause_trainer()
        else:
            await self._go_on()

    async def _go_on(self) -> None:
        """Issue what waited for a step or an evaluation, and decide on what waited for that."""
        await self._issue()
        await self._carry_out(self.batches.decide(self.issuer.version), self.issuer.version)

    def _tell_recorded(self) -> None:
        """A commit may contain the steps that are recorded, but none beyond a version that is still evaluated."""
        evaluated = self.evaluator.oldest
        if self.unsaid is not None and (evaluated is None or self.unsaid.step < evaluated):
            self._tell_trainer(self.unsaid)
            self.unsaid = None

    async def _evaluated(self, message: Evaluated) -> None:
        """An evaluation is complete: record it, and go on with what waited for it."""
        if not self.evaluator.counts(message):
            return
        line = await self.blocking(self.evaluator.record, message)
        self.evaluator.recorded(message, line)
        self.event("eval", **line)
        self._tell_recorded()
        if self.finishing is not None:
            self._end_when_settled()
        else:
            await self._go_on()

    async def _only_evaluate(self) -> None:
        """A job without steps: its rollout actors have the weights."""
        self.run_attempt = self.ledger.last_run_attempt() + 1
        self.ledger.reconcile(None, self.run_attempt)
        self.committed_step = 0
        self.evaluator.begin_run(
            self.run_attempt, await self.blocking(recorded_evaluations, self.run_dir)
        )
        self.finishing = ("done", "the model was evaluated")
        self.newest = WeightsPublished(
            run_attempt=self.run_attempt, policy_version=0, path="", size_bytes=0
        )
        for rollout in self.peers_of("rollout"):
            self.endpoint.send(rollout.peer, self.newest)
        self.progress.made()
        if self.evaluator.is_due(0):
            self.evaluator.start(0)
        else:
            self._end_when_settled()

    def _line(self, message: StepDone, batch: Batch) -> dict[str, Any]:
        now = time.monotonic()
        seconds, self.step_began = now - self.step_began, now
        line = step_line(
            message, batch, run_attempt=self.run_attempt, now=time.time(), seconds=seconds
        )
        return line | self.stage_seconds.since_last(self._kind_of)

    def _kind_of(self, actor: str) -> str:
        peer = self.peers.get(actor)  # None: it is gone since
        return peer.kind if peer is not None else actor.rpartition("/")[2].partition("-")[0]

    async def _committed(self, message: Committed) -> None:
        if message.run_attempt != self.run_attempt:
            return
        await self.blocking(self.ledger.commit, message.step, message.policy_version)
        await self.blocking(self.evaluator.committed, message.step)
        self.event("commit", step=message.step, seconds=round(message.seconds, 4))
        self.committed_step = message.step
        if self.finishing is not None:
            self._end_when_settled()

    def _paused(self, message: Paused) -> None:
        # Its last commit says nothing of a hand-over: it may train the next step since, from groups that it had.
        current = message.run_attempt == self.run_attempt
        if current and self.handing_over is not None and not self.handed_over:
            self._tell_handed_over()

    def _tell_handed_over(self) -> None:
        assert self.handing_over is not None
        self.handed_over = True
        self.endpoint.send(FLOWD, HandedOver(job=self.spec.job, replica=self.handing_over))

    def _finish(self, state: str, reason: str) -> None:
        """End the job once the trainer has committed where it stands, and that was evaluated."""
        self.finishing = (state, reason)
        self.evaluator.start(self.issuer.version)
        self._pause_trainer()

    def _end_when_settled(self) -> None:
        settled = self.committed_step == self.issuer.version and self.evaluator.oldest is None
        if self.finishing is not None and settled:
            self._end(*self.finishing)

    def _pause_trainer(self) -> None:
        self._tell_trainer(CommitAndPause())

    def _end(self, state: str, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result((state, reason))

    def _tell_trainer(self, message: Message) -> None:
        # Without a trainer there is nobody to tell: its successor starts from the last commit.
        if self.trainer is not None:
            self.endpoint.send(self.trainer.peer, message)

    async def _watch_progress(self) -> None:
        if self.config.guards.no_progress_s:
            self._end("failed", await self.progress.stalled())
