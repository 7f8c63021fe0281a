"""The conductor among a trainer, env and rollout actors that the tests play."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from actor_stage import JOB, Peer, Stage, job_config

from actors.conductor.group_set import GroupSet
from actors.conductor.ledger import Ledger, audit
from actors.conductor.manifest import Manifest, write_manifest
from actors.host import ActorHost
from actors.job_config import JobConfig
from channels.channel import Consumer, Item
from channels.lifecycle import HandedOver, HandOver, JobEvent, JobFinished, Ready
from channels.weights import WeightsPublished
from channels.work import (
    Admit,
    AskCall,
    BeginRun,
    CommitAndPause,
    Committed,
    Drop,
    GroupReceived,
    InCall,
    Paused,
    StageTimes,
    StepDone,
    TrainerReady,
)

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def conductor_config(**sections: Any) -> JobConfig:
    return job_config(metrics={"tensorboard": False}, **sections)


class Play:
    """A conductor, with a trainer and an env actor that the test moves."""

    def __init__(self, tmp_path: Path, config: JobConfig) -> None:
        self.config = config
        self.stage = Stage(tmp_path, "conductor", config, actor="conductor")
        self.run_attempt = -1
        self.step = 0
        self.committed: list[int] = []
        self.trained: list[int] = []
        self.admitted = 0  # messages of the trainer that were looked at
        self.trainer: Peer
        self.env: Peer
        self.tickets: Consumer

    async def __aenter__(self) -> "Play":
        await self.stage.__aenter__()
        self.commit_on_disk()
        self.env = await self.stage.meet("env-0", "env")
        self.tickets = self.env.router.consumer("tickets", capacity=100)
        self.env.endpoint.connect(self.stage.spec.peer, self.stage.endpoint.address)
        self.tickets.add_producer(self.stage.spec.peer)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.stage.__aexit__(*error)

    def commit_on_disk(self) -> None:
        self.committed = list(self.trained)
        manifest = Manifest(
            step=self.step,
            policy_version=self.step,
            run_attempt=max(self.run_attempt, 0),
            groups=GroupSet.of(self.committed),
        )
        write_manifest(self.stage.run_dir, manifest)

    def say(self, message: Any) -> None:
        self.trainer.endpoint.send(self.stage.spec.peer, message)

    async def trainer_comes(self, epoch: int = 0) -> BeginRun:
        """A trainer that stands at the last commit; it publishes its weights."""
        self.trainer = await self.stage.meet("trainer-0", "trainer", epoch=epoch)
        self.trained = list(self.committed)
        self.say(TrainerReady(epoch=epoch, step=self.step, run_attempt=max(self.run_attempt, 0)))
        begin = await self.trainer.take(BeginRun)
        assert begin.step == self.step
        self.run_attempt = begin.run_attempt
        self.publish()
        return begin

    def published(self) -> WeightsPublished:
        return WeightsPublished(
            run_attempt=self.run_attempt, policy_version=self.step, path="", size_bytes=0
        )

    def publish(self) -> None:
        self.say(self.published())

    async def take(self, count: int) -> list[Item]:
        """Tickets, in the order they came."""
        return [await self.tickets.get() for _ in range(count)]

    def delivered(self, ticket: dict[str, Any], reward: float = 1.0, version: int = -1) -> None:
        """The trainer holds the group of a ticket."""
        version = ticket["version"] if version < 0 else version
        self.say(
            GroupReceived(
                group=ticket["group"],
                attempt=ticket["attempt"],
                run_attempt=ticket["run_attempt"],
                min_version=version,
                max_version=version,
                tokens=10,
                rewards=[reward, 0.0],
                info={"correct": reward},
            )
        )

    async def take_admits(self, count: int) -> list[Admit]:
        """The next admissions."""
        self.admitted += count
        await self.trainer.take(Admit, self.admitted)
        return self.trainer.of(Admit)[self.admitted - count : self.admitted]

    async def step_done(self, groups: list[int], *, commit: bool = True, **metrics: float) -> None:
        """The trainer takes a step: publish, tell, commit."""
        self.trained += groups
        self.step += 1
        self.publish()
        self.say(
            StepDone(
                run_attempt=self.run_attempt,
                step=self.step - 1,
                policy_version=self.step,
                metrics={"loss": 0.5, **metrics},
            )
        )
        if commit:
            self.commit_on_disk()
            self.say_committed()

    def say_committed(self) -> None:
        self.say(Committed(run_attempt=self.run_attempt, step=self.step, policy_version=self.step))

    def say_paused(self) -> None:
        """The answer to CommitAndPause."""
        self.say_committed()
        self.say(Paused(run_attempt=self.run_attempt, step=self.step))

    async def whole_step(self, **given: Any) -> list[int]:
        """Tickets of a step are played, delivered, admitted, trained and committed."""
        size = self.config.job.groups_per_step
        items = await self.take(size)
        for item in items:
            self.delivered(item.payload)
            item.ack()
        groups = [admit.group for admit in await self.take_admits(size)]
        await self.step_done(groups, **given)
        return groups

    def steps(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics_text().splitlines()]

    def metrics_text(self) -> str:
        return (self.stage.run_dir / "metrics.jsonl").read_text()

    def trainer_dies(self) -> None:
        self.stage.lose("trainer-0")
        self.step = max(
            int(path.name.removeprefix("step-"))
            for path in (self.stage.run_dir / "checkpoints").iterdir()
        )
        self.admitted = 0


def test_issues_nothing_before_the_first_version_is_out(run: Run, tmp_path: Path) -> None:
    """Tickets follow the weights: group, seed, and the version to play with."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(job={"max_staleness": 1})) as play:
            play.trainer = await play.stage.meet("trainer-0", "trainer")
            play.say(TrainerReady(epoch=0, step=0, run_attempt=0))
            assert await play.trainer.take(BeginRun) == BeginRun(run_attempt=0, step=0)
            assert play.tickets.get_nowait() is None
            play.run_attempt = 0
            play.publish()
            tickets = [item.payload for item in await play.take(4)]
            assert [t["group"] for t in tickets] == [0, 1, 2, 3]
            assert [t["step"] for t in tickets] == [0, 0, 1, 1]
            assert {t["version"] for t in tickets} == {0}
            assert {t["attempt"] for t in tickets} == {0}
            assert len({t["seed"] for t in tickets}) == 4
            assert all(0 <= t["seed"] < 2**63 for t in tickets)
            assert all(t["exact"] and t["group_size"] == 2 for t in tickets)

    run(main)


def test_a_job_from_first_ticket_to_its_end(run: Run, tmp_path: Path) -> None:
    """Two steps, a metrics line each, the last commit ends it, and the ledger is sound."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(job={"steps": 2})) as play:
            await play.trainer_comes()
            assert await play.whole_step() == [0, 1]
            assert await play.whole_step() == [2, 3]
            finished = await play.stage.heard(JobFinished)
            assert (finished.state, finished.reason) == ("done", "all 2 steps were trained")
            first, second = play.steps()
            assert (first["step"], first["policy_version"], first["attempt"]) == (0, 1, 0)
            assert first["reward_mean"] == 0.5
            assert first["reward_std"] == 0.5
            assert (first["groups"], first["group_ids"], first["samples"]) == (2, [0, 1], 4)
            assert (first["tokens"], first["info_correct"], first["loss"]) == (20, 1.0, 0.5)
            assert first["staleness_max"] == second["staleness_max"] == 0
            assert await play.stage.life == 0
            report = audit(play.stage.run_dir, finished=True)
            assert report.ok, report.problems

    run(main)


def test_admissions_close_a_step_with_its_last_group(run: Run, tmp_path: Path) -> None:
    """In order of arrival, numbered, the last one says so; commits are due every so many steps."""

    async def main() -> None:
        config = conductor_config(
            job={"groups_per_step": 3, "max_staleness": 1}, checkpoint={"every_steps": 2}
        )
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            tickets = {item.payload["group"]: item.payload for item in await play.take(6)}
            for group in (2, 5, 0, 3, 1, 4):
                play.delivered(tickets[group])
            admits = await play.take_admits(6)
            assert [(a.group, a.step, a.last, a.commit) for a in admits] == [
                (2, 0, False, False),
                (5, 1, False, True),
                (0, 0, False, False),
                (3, 1, False, True),
                (1, 0, True, False),
                (4, 1, True, True),
            ]

    run(main)


def test_duplicates_and_strangers_are_dropped(run: Run, tmp_path: Path) -> None:
    """A group that came twice, one that was never issued, one of another run attempt."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            first = (await play.take(2))[0].payload
            play.delivered(first)
            play.delivered(first)
            play.delivered({**first, "group": 77})
            play.delivered({**first, "group": 1, "run_attempt": 5})
            await play.trainer.take(Drop, 3)
            assert [(d.group, d.attempt) for d in play.trainer.of(Drop)] == [
                (0, 0),
                (77, 0),
                (1, 0),
            ]
            assert [a.group for a in play.trainer.of(Admit)] == [0]

    run(main)


def test_deterministic_job_admits_whole_steps_in_order(run: Run, tmp_path: Path) -> None:
    """Nothing before the step is full, then by index; sampled with the oldest version that the bound allows."""

    async def main() -> None:
        config = conductor_config(
            job={"groups_per_step": 3, "deterministic": True, "max_staleness": 1}
        )
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            items = await play.take(6)
            tickets = {item.payload["group"]: item.payload for item in items}
            assert all(t["exact"] and t["version"] == 0 for t in tickets.values())
            for group in (2, 4, 0):
                play.delivered(tickets[group])
            play.delivered(tickets[0])
            await play.trainer.take(Drop)
            assert not play.trainer.of(Admit)
            play.delivered(tickets[1])
            admits = await play.take_admits(3)
            assert [(a.group, a.order, a.last) for a in admits] == [
                (0, 0, False),
                (1, 1, False),
                (2, 2, True),
            ]
            for item in items:
                item.ack()
            await play.step_done([0, 1, 2])
            later = [item.payload for item in await play.take(3)]
            assert {(t["step"], t["version"]) for t in later} == {(2, 1)}

    run(main)


def test_weights_reach_every_rollout_also_a_late_one(run: Run, tmp_path: Path) -> None:
    """Each version in order; who joins later gets the newest at once."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            early = await play.stage.meet("rollout-0", "rollout")
            await play.trainer_comes()
            await early.take(WeightsPublished)
            await play.whole_step()
            assert (await early.take(WeightsPublished, 2)).policy_version == 1
            late = await play.stage.meet("rollout-1", "rollout")
            assert (await late.take(WeightsPublished)).policy_version == 1
            stale = WeightsPublished(run_attempt=9, policy_version=9, path="", size_bytes=0)
            play.say(stale)
            await play.whole_step()
            await late.take(WeightsPublished, 2)
            assert stale not in late.messages

    run(main)


def test_staleness_is_what_was_sampled(run: Run, tmp_path: Path) -> None:
    """The lag of a group is its step less the oldest version among its tokens."""

    async def main() -> None:
        config = conductor_config(
            job={"groups_per_step": 1, "max_staleness": 1}, rollout={"adopt": "turn"}
        )
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            for item in await play.take(2):
                assert not item.payload["exact"]
                play.delivered(item.payload)
                item.ack()
            await play.take_admits(2)
            await play.step_done([0])
            await play.step_done([1])
            await play.stage.heard(JobEvent, 4)  # a step and a commit each
            assert [line["staleness_max"] for line in play.steps()] == [0, 1]

    run(main)


def test_a_new_trainer_takes_the_job_back_to_its_commit(run: Run, tmp_path: Path) -> None:
    """What the commit does not contain is issued again, as the next attempt with the same seed; the rest is void."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(checkpoint={"every_steps": 5})) as play:
            await play.trainer_comes()
            items = await play.take(2)
            for item in items:
                play.delivered(item.payload)
                item.ack()
            await play.take_admits(2)
            await play.step_done([0, 1], commit=False)
            under_way = await play.take(2)
            play.trainer_dies()
            begin = await play.trainer_comes(epoch=1)
            assert begin == BeginRun(run_attempt=1, step=0)
            assert all(item.cancelled for item in under_way)
            for item in under_way:
                item.ack()
            again = [item.payload for item in await play.take(2)]
            assert [(t["group"], t["attempt"], t["run_attempt"]) for t in again] == [
                (0, 1, 1),
                (1, 1, 1),
            ]
            assert [t["seed"] for t in again] == [item.payload["seed"] for item in items]
            (rollback,) = [e for e in play.stage.of(JobEvent) if e.kind == "rollback"]
            assert rollback.data["step"] == 0
            assert rollback.data["attempt"] == 1
            assert rollback.data["groups"] == 4
            # What was played for the attempt before is dropped.
            play.delivered(under_way[0].payload)
            drop = await play.trainer.take(Drop)
            assert (drop.group, drop.attempt) == (2, 0)

    run(main)


def test_what_a_dead_trainer_said_last_is_not_told_to_its_successor(
    run: Run, tmp_path: Path
) -> None:
    """The new one holds none of these groups: it hears nothing before its own BeginRun."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            items = await play.take(2)
            dead = play.trainer
            play.trainer_dies()
            play.trainer = await play.stage.meet("trainer-0", "trainer", epoch=1)
            # Still on their way when it died; delivered after the successor was met.
            late = dead.endpoint.name
            for item in items:
                play.stage.actor.on_message(
                    late,
                    GroupReceived(
                        group=item.payload["group"],
                        attempt=0,
                        run_attempt=0,
                        min_version=0,
                        max_version=0,
                        tokens=1,
                        rewards=[1.0],
                        info={},
                    ),
                    None,
                )
            play.stage.actor.on_message(late, TrainerReady(epoch=0, step=0, run_attempt=0), None)
            play.say(TrainerReady(epoch=1, step=0, run_attempt=0))
            begin = await play.trainer.take(BeginRun)
            assert play.trainer.messages == [begin]
            assert begin.run_attempt == 1

    run(main)


def test_stop_reward_ends_the_job_after_a_commit(run: Run, tmp_path: Path) -> None:
    """The mean over the window is looked at; the trainer commits where it stands, then the job is done."""

    async def main() -> None:
        config = conductor_config(
            job={"steps": 50, "stop_reward": 0.5, "stop_window": 2},
            checkpoint={"every_steps": 100},
        )
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            await play.whole_step(commit=False)
            await play.take(2)
            assert not play.trainer.of(CommitAndPause), "the window is not full yet"
            for group in (2, 3):
                play.delivered({"group": group, "attempt": 0, "run_attempt": 0, "version": 1})
            await play.take_admits(2)
            await play.step_done([2, 3], commit=False)
            await play.trainer.take(CommitAndPause)
            assert not play.stage.of(JobFinished)
            play.commit_on_disk()
            play.say_committed()
            play.say_committed()  # asked twice, said twice
            finished = await play.stage.heard(JobFinished)
            assert finished.state == "done"
            assert "mean reward of the last 2 steps is 0.500, stop_reward = 0.5" in finished.reason
            assert await play.stage.life == 0

    run(main)


def test_a_trainer_that_dies_before_its_last_commit_trains_again(run: Run, tmp_path: Path) -> None:
    """The steps that were to end the job are rolled back with it: the job goes on rather than hang."""

    async def main() -> None:
        config = conductor_config(job={"steps": 1}, checkpoint={"every_steps": 9})
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            await play.whole_step(commit=False)
            await play.trainer.take(CommitAndPause)
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            assert await play.whole_step() == [0, 1]
            assert (await play.stage.heard(JobFinished)).state == "done"
            assert [(line["step"], line["attempt"]) for line in play.steps()] == [(0, 0), (0, 1)]

    run(main)


def test_rewards_of_rolled_back_steps_do_not_count(run: Run, tmp_path: Path) -> None:
    """`stop_window` is over steps that the weights contain."""

    async def main() -> None:
        config = conductor_config(
            job={"steps": 9, "stop_reward": 0.5, "stop_window": 2},
            checkpoint={"every_steps": 9},
        )
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            await play.whole_step(commit=False)
            await play.stage.until(lambda: len(play.stage.actor.rewards) == 1)
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            await play.stage.until(lambda: not play.stage.actor.rewards)
            await play.whole_step(commit=False)
            await play.take(2)
            assert not play.trainer.of(CommitAndPause)

    run(main)


def test_a_finished_run_ends_at_once(run: Run, tmp_path: Path) -> None:
    """Resumed after its last step, there is nothing to train."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(job={"steps": 3})) as play:
            play.step = 3
            play.trained = list(range(6))
            play.commit_on_disk()
            play.trainer = await play.stage.meet("trainer-0", "trainer")
            play.say(TrainerReady(epoch=0, step=3, run_attempt=0))
            finished = await play.stage.heard(JobFinished)
            assert (finished.state, finished.reason) == ("done", "all 3 steps were already trained")
            assert not play.trainer.of(BeginRun)

    run(main)


def test_hands_over_between_steps(run: Run, tmp_path: Path) -> None:
    """Nothing new is issued, the trainer commits, flowd hears it; the next trainer goes on from there."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(checkpoint={"every_steps": 9})) as play:
            await play.trainer_comes()
            await play.whole_step(commit=False)
            await play.take(2)
            play.stage.tell(HandOver(replica="trainer-0"))
            await play.trainer.take(CommitAndPause)
            play.commit_on_disk()
            play.say_paused()
            assert (await play.stage.heard(HandedOver)).replica == "trainer-0"
            play.trainer_dies()
            begin = await play.trainer_comes(epoch=1)
            assert (begin.step, begin.run_attempt) == (1, 1)
            assert len(play.stage.of(HandedOver)) == 1

    run(main)


def test_hands_over_after_the_step_that_has_begun(run: Run, tmp_path: Path) -> None:
    """Groups that were admitted are trained first: their work is not thrown away."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(checkpoint={"every_steps": 9})) as play:
            await play.trainer_comes()
            tickets = [item.payload for item in await play.take(2)]
            play.delivered(tickets[0])
            await play.take_admits(1)
            play.stage.tell(HandOver(replica="trainer-0"))
            play.delivered(tickets[1])
            await play.take_admits(1)
            assert not play.trainer.of(CommitAndPause)
            await play.step_done([0, 1], commit=False)
            await play.trainer.take(CommitAndPause)
            play.commit_on_disk()
            play.say_paused()
            await play.stage.heard(HandedOver)
            assert play.tickets.get_nowait() is None, "nothing is issued while handing over"

    run(main)


def test_a_commit_is_not_yet_a_hand_over(run: Run, tmp_path: Path) -> None:
    """The trainer had the next step's groups when it was told to pause: that step is not to be taken back."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(job={"max_staleness": 1})) as play:
            await play.trainer_comes()
            tickets = [item.payload for item in await play.take(4)]
            for ticket in tickets:
                play.delivered(ticket)
            await play.take_admits(4)
            play.stage.tell(HandOver(replica="trainer-0"))
            await play.step_done([0, 1])
            await play.trainer.take(CommitAndPause)
            await play.step_done([2, 3], commit=False)
            play.commit_on_disk()
            play.say_committed()
            await play.stage.until(lambda: play.stage.actor.committed_step == 2)
            assert not play.stage.of(HandedOver)
            play.say_paused()
            await play.stage.heard(HandedOver)
            play.trainer_dies()
            assert (await play.trainer_comes(epoch=1)).step == 2
            assert [line["step"] for line in play.steps()] == [0, 1]

    run(main)


def test_hand_over_of_a_trainer_that_dies_is_answered(run: Run, tmp_path: Path) -> None:
    """Its successor stands at a commit: flowd need not wait for its deadline."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            await play.take(2)
            play.stage.tell(HandOver(replica="trainer-0"))
            await play.trainer.take(CommitAndPause)
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            assert (await play.stage.heard(HandedOver)).replica == "trainer-0"

    run(main)


def test_a_ticket_of_a_trained_group_is_cancelled(run: Run, tmp_path: Path) -> None:
    """Its env actor died after the group was delivered; playing it again is of no use to anyone."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            items = await play.take(2)
            for item in items:
                play.delivered(item.payload)  # and no acknowledgement
            await play.take_admits(2)
            await play.step_done([0, 1])
            await asyncio.gather(*(item.wait_cancelled() for item in items))
            for item in items:
                item.ack()
            assert [item.payload["group"] for item in await play.take(2)] == [2, 3]

    run(main)


@pytest.mark.parametrize("metric", ["loss", "grad_norm"])
def test_a_loss_that_is_no_number_fails_the_job(run: Run, tmp_path: Path, metric: str) -> None:
    """The guard's sentence is the reason."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            await play.whole_step(commit=False, **{metric: float("nan"), "kl": float("-inf")})
            finished = await play.stage.heard(JobFinished)
            # The line and what followers are told say null: JSON has no such numbers.
            (line,) = [msgspec.json.decode(x) for x in play.metrics_text().splitlines()]
            (event,) = [e.data for e in play.stage.of(JobEvent) if e.kind == "step"]
            assert line == event
            assert (line[metric], line["kl"]) == (None, None)
            assert line["reward_mean"] == 0.5
            assert finished.state == "failed"
            assert finished.reason.startswith(f"{metric} is nan: the update was not committed")

    run(main)


def test_no_step_for_too_long_fails_the_job(run: Run, tmp_path: Path) -> None:
    """Counted from the first BeginRun: warming up may take as long as it takes."""

    async def main() -> None:
        config = conductor_config(guards={"no_progress_s": 0.05})
        async with Play(tmp_path, config) as play:
            waiting = asyncio.create_task(play.stage.heard(JobFinished))
            done, _ = await asyncio.wait({waiting}, timeout=0.15)
            assert not done, "no trainer is there yet"
            await play.trainer_comes()
            finished = await waiting
            assert finished.state == "failed"
            assert finished.reason.startswith("no trainer step for 0.05 s (guards.no_progress_s)")

    run(main)


def test_a_job_that_hangs_says_where(run: Run, tmp_path: Path) -> None:
    """The reason names the actor whose simulator does not come back, not those that only wait for it."""
    entered, go_on = threading.Event(), threading.Event()

    def simulator_step() -> None:
        entered.set()
        go_on.wait(20.0)

    async def main() -> None:
        config = conductor_config(guards={"no_progress_s": 0.3})
        play = Play(tmp_path, config)
        hung = Stage(tmp_path, "env", config, hub=play.stage.hub, actor="env-1")
        hung.host = ActorHost(hung.spec, hung.endpoint, inline=False)
        async with play, hung:
            await hung.heard(Ready)
            for one, other in ((play.stage, hung), (hung, play.stage)):
                one.tell(other.introduction)
            await play.stage.until(lambda: hung.spec.peer in play.stage.actor.peers)
            await hung.until(lambda: play.stage.spec.peer in hung.actor.peers)
            stuck = asyncio.create_task(hung.actor.blocking(simulator_step))
            await asyncio.to_thread(entered.wait, 20.0)
            await play.trainer_comes()
            for peer in (play.env, play.trainer):
                asked = asyncio.create_task(peer.take(AskCall))
                asked.add_done_callback(
                    lambda _, peer=peer: peer.endpoint.send(
                        play.stage.spec.peer, InCall(call="", seconds=0.0)
                    )
                )
            finished = await play.stage.heard(JobFinished)
            assert finished.state == "failed"
            where = finished.reason.partition("(guards.no_progress_s): ")[2]
            assert where.startswith("env-1 has been in one blocking call for 0 s (")
            assert "simulator_step at " in where
            assert "env-0" not in where
            assert "trainer-0" not in where
            go_on.set()
            await stuck

    run(main)


def test_an_actor_whose_loop_hangs_is_named(run: Run, tmp_path: Path) -> None:
    """It cannot say where; that it does not answer is what there is to know."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(guards={"no_progress_s": 0.05})) as play:
            await play.trainer_comes()
            finished = await play.stage.heard(JobFinished)
            assert "env-0 does not answer; trainer-0 does not answer; " in finished.reason

    run(main)


def test_a_job_that_was_ended_takes_nothing_more(run: Run, tmp_path: Path) -> None:
    """What is queued behind the message that ended it stays untouched: no group is admitted to a dead job."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(job={"max_staleness": 1})) as play:
            await play.trainer_comes()
            items = await play.take(4)
            for item in items[:2]:
                play.delivered(item.payload)
            await play.take_admits(2)
            await play.step_done([0, 1], commit=False, loss=float("nan"))
            for item in items[2:]:
                play.delivered(item.payload)  # in the same breath
            assert (await play.stage.heard(JobFinished)).state == "failed"
            assert await play.stage.life == 0
            assert play.stage.actor.inbox.qsize() > 0, "there was something to leave alone"
            assert [admit.group for admit in play.trainer.of(Admit)] == [0, 1]
            with Ledger(tmp_path / "ledger.sqlite") as ledger:
                assert [ledger.current(group) for group in (2, 3)] == [(0, "discarded")] * 2

    run(main)


def test_ends_while_a_commit_is_being_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a worker thread, as in a process of its own: the ledger's last changes follow what it is busy with."""
    writing, may_go_on = threading.Event(), threading.Event()
    commit = Ledger.commit

    def slow_commit(ledger: Ledger, step: int, policy_version: int) -> None:
        with ledger._transaction():
            writing.set()
            assert may_go_on.wait(20.0)
        commit(ledger, step, policy_version)

    monkeypatch.setattr(Ledger, "commit", slow_commit)

    async def main() -> None:
        play = Play(tmp_path, conductor_config(guards={"no_progress_s": 0.2}))
        play.stage.host = ActorHost(play.stage.spec, play.stage.endpoint, inline=False)
        async with play:
            await play.trainer_comes()
            await play.whole_step()
            await asyncio.to_thread(writing.wait, 20.0)
            await play.stage.actor.ended
            for _ in range(20):  # it would go on at once, were it not for the worker
                await asyncio.sleep(0)
            assert not play.stage.of(JobFinished)
            may_go_on.set()
            assert (await play.stage.heard(JobFinished)).state == "failed"
            assert await play.stage.life == 0
            assert audit(tmp_path, finished=True).ok

    run(main)


def test_times_of_a_restarted_actor_are_not_negative(run: Run, tmp_path: Path) -> None:
    """Its seconds count from its own start: what it said before is no part of them."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            play.env.endpoint.send(play.stage.spec.peer, StageTimes(seconds={"work": 10.0}))
            await play.whole_step()
            play.env.endpoint.send(play.stage.spec.peer, StageTimes(seconds={"work": 0.5}))
            await play.stage.until(
                lambda: play.stage.actor.stage_seconds.told[f"{JOB}/env-0"]["work"] == 0.5
            )
            await play.whole_step()
            await play.stage.heard(JobEvent, 4)  # a step and a commit each
            assert [line["env_work_s"] for line in play.steps()] == [10.0, 0.5]

    run(main)


FILTERED = {"algorithm": {"dynamic_sampling": True, "max_sampling_rounds": 3}}


def state(play: Play, group: int) -> tuple[int, str] | None:
    with Ledger(play.stage.run_dir / "ledger.sqlite") as ledger:
        return ledger.current(group)


def test_a_group_that_teaches_nothing_makes_way_for_another(run: Run, tmp_path: Path) -> None:
    """Its samples have one reward: it is dropped, its seat goes to a new index at once, and the metrics tell."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(**FILTERED)) as play:
            await play.trainer_comes()
            one, two = await play.take(2)
            play.delivered(one.payload, reward=0.0)
            (three,) = await play.take(1)
            assert (three.payload["group"], three.payload["step"]) == (2, 0)
            await play.trainer.take(Drop)
            assert state(play, 0) == (0, "discarded")
            play.delivered(two.payload)
            play.delivered(three.payload)
            admits = await play.take_admits(2)
            assert [(admit.group, admit.last) for admit in admits] == [(1, False), (2, True)]
            for item in (one, two, three):
                item.ack()
            await play.step_done([1, 2])
            await play.take(2)
            (line,) = play.steps()
            assert line["group_ids"] == [1, 2]
            assert (line["groups"], line["groups_sampled"]) == (2, 3)
            assert line["filtered_share"] == pytest.approx(1 / 3, abs=1e-6)
            assert line["useful_share"] == 1.0
            # Over everything that was sampled: 0, 0 | 1, 0 | 1, 0.
            assert line["reward_mean"] == pytest.approx(1 / 3, abs=1e-6)
            assert line["info_correct"] == pytest.approx(2 / 3, abs=1e-6)
            found = audit(play.stage.run_dir)
            assert found.ok, found.problems
            assert found.counts["discarded_filtered"] == 1

    run(main)


def test_without_a_filter_the_useless_are_counted(run: Run, tmp_path: Path) -> None:
    """All groups are trained, and the metrics say how many of them teach anything."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config()) as play:
            await play.trainer_comes()
            for item, reward in zip(await play.take(2), (0.0, 1.0), strict=True):
                play.delivered(item.payload, reward=reward)
                item.ack()
            await play.take_admits(2)
            await play.step_done([0, 1])
            await play.take(2)
            (line,) = play.steps()
            assert (line["groups_sampled"], line["filtered_share"]) == (2, 0.0)
            assert line["useful_share"] == 0.5

    run(main)


def test_a_deterministic_job_filters_in_rounds(run: Run, tmp_path: Path) -> None:
    """Nothing is decided before all seats of the next step have their group; replacements go by index."""

    async def main() -> None:
        config = conductor_config(
            job={"groups_per_step": 3, "deterministic": True, "max_staleness": 1}, **FILTERED
        )
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            items = await play.take(6)
            tickets = {item.payload["group"]: item.payload for item in items}
            for item in items:
                item.ack()
            for group in (5, 4, 3):  # all of step 1: its turn has not come
                play.delivered(tickets[group], reward=0.0 if group == 4 else 1.0)
            play.delivered(tickets[2], reward=0.0)
            play.delivered(tickets[0], reward=0.0)
            play.delivered(tickets[1])
            again = await play.take(2)
            assert [(i.payload["group"], i.payload["step"]) for i in again] == [(6, 0), (7, 0)]
            assert not play.trainer.of(Admit)
            for item in reversed(again):
                play.delivered(item.payload)
                item.ack()
            admits = await play.take_admits(3)
            assert [admit.group for admit in admits] == [1, 6, 7]
            await play.step_done([1, 6, 7])
            later = [item.payload for item in await play.take(4)]
            assert sorted((t["group"], t["step"]) for t in later) == [
                *((8, 2), (9, 2), (10, 2)),
                (11, 1),  # in place of 4, after the indices that the policy clock gave
            ]

    run(main)


def test_what_was_filtered_out_of_a_lost_step_is_sampled_again(run: Run, tmp_path: Path) -> None:
    """The commit does not contain the step, and other weights may find the group worth training on."""

    async def main() -> None:
        config = conductor_config(checkpoint={"every_steps": 2}, **FILTERED)
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            first = await play.take(2)
            play.delivered(first[0].payload, reward=0.0)
            (third,) = await play.take(1)
            play.delivered(first[1].payload)
            play.delivered(third.payload)
            await play.take_admits(2)
            for item in (*first, third):
                item.ack()
            await play.step_done([1, 2], commit=False)
            await play.take(2)
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            again = [item.payload for item in await play.take(2)]
            assert [(t["group"], t["attempt"]) for t in again] == [(0, 1), (1, 1)]
            found = audit(play.stage.run_dir)
            assert found.ok, found.problems

    run(main)


def test_what_was_filtered_before_a_commit_stays_out(run: Run, tmp_path: Path) -> None:
    """Its step is in the weights, with others in its place."""

    async def main() -> None:
        async with Play(tmp_path, conductor_config(**FILTERED)) as play:
            await play.trainer_comes()
            first = await play.take(2)
            play.delivered(first[0].payload, reward=0.0)
            (third,) = await play.take(1)
            play.delivered(first[1].payload)
            play.delivered(third.payload)
            await play.take_admits(2)
            for item in (*first, third):
                item.ack()
            await play.step_done([1, 2])
            await play.take(2)
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            assert [item.payload["group"] for item in await play.take(2)] == [3, 4]
            assert state(play, 0) == (0, "discarded")

    run(main)


def test_a_step_with_nothing_to_learn_ends_the_job_after_a_commit(run: Run, tmp_path: Path) -> None:
    """Three rounds of two groups: four are filtered out, the last two are trained, in vain."""

    async def main() -> None:
        config = conductor_config(checkpoint={"every_steps": 9}, **FILTERED)
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            for _ in range(3):
                for item in await play.take(2):
                    play.delivered(item.payload, reward=0.0)
                    item.ack()
            assert [admit.group for admit in await play.take_admits(2)] == [4, 5]
            assert len(play.trainer.of(Drop)) == 4
            await play.step_done([4, 5], commit=False)
            await play.trainer.take(CommitAndPause)
            play.commit_on_disk()
            play.say_committed()
            finished = await play.stage.heard(JobFinished)
            assert finished.state == "failed"
            assert "step 0: not one of 6 groups" in finished.reason
            assert "always 0" in finished.reason
            (line,) = play.steps()
            assert (line["groups_sampled"], line["useful_share"]) == (6, 0.0)

    run(main)


def test_hands_over_a_step_that_has_to_be_sampled_again(run: Run, tmp_path: Path) -> None:
    """The step that has begun gets its replacements, and nothing is begun after it."""

    async def main() -> None:
        config = conductor_config(job={"max_staleness": 1}, **FILTERED)
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            items = await play.take(4)
            play.delivered(items[0].payload)
            await play.take_admits(1)
            play.stage.tell(HandOver(replica="trainer-0"))
            play.delivered(items[1].payload, reward=0.0)
            (again,) = await play.take(1)
            assert (again.payload["group"], again.payload["step"]) == (4, 0)
            play.delivered(again.payload)
            await play.take_admits(1)
            await play.step_done([0, 4], commit=False)
            await play.trainer.take(CommitAndPause)
            play.commit_on_disk()
            play.say_paused()
            await play.stage.heard(HandedOver)
            assert play.tickets.get_nowait() is None

    run(main)


def test_hands_over_at_once_where_filtering_left_nothing(run: Run, tmp_path: Path) -> None:
    """A deterministic step had arrived, so it was waited for; all of it is filtered out, so it has not begun."""

    async def main() -> None:
        config = conductor_config(job={"deterministic": True}, **FILTERED)
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            items = await play.take(2)
            play.delivered(items[0].payload, reward=0.0)
            play.delivered(items[0].payload, reward=0.0)
            await play.trainer.take(Drop)  # the duplicate: the first one was taken in
            play.stage.tell(HandOver(replica="trainer-0"))
            play.delivered(items[1].payload, reward=0.0)
            await play.trainer.take(CommitAndPause)
            play.say_paused()
            await play.stage.heard(HandedOver)

    run(main)


def test_a_filter_on_a_number_that_is_not_there_fails_the_job(run: Run, tmp_path: Path) -> None:
    """The reason names the numbers that there are."""

    async def main() -> None:
        config = conductor_config(algorithm={"filter_range": [0, 1], "filter_key": "accuracy"})
        async with Play(tmp_path, config) as play:
            await play.trainer_comes()
            play.delivered((await play.take(1))[0].payload)
            finished = await play.stage.heard(JobFinished)
            assert finished.state == "failed"
            assert "use reward, correct" in finished.reason

    run(main)
