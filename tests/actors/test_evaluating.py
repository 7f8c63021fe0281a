"""Evaluations beside training: the conductor among a trainer and an env actor that the tests play."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from test_conductor_actor import Play, conductor_config

from actors.conductor.evaluating import evaluation_file, recorded_evaluations
from actors.conductor.ledger import audit
from channels.channel import Consumer, Item
from channels.lifecycle import JobEvent, JobFinished
from channels.weights import WeightsPublished
from channels.work import BeginRun, CommitAndPause, StepRecorded

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
EVAL = {"every_steps": 2, "problems": 2, "k": 2}
TICKETS = 4  # two problems in two modes


class EvalPlay(Play):
    """A `Play` whose env actor also takes the problems of evaluations."""

    evaluations: Consumer

    async def __aenter__(self) -> "EvalPlay":
        await super().__aenter__()
        self.evaluations = self.env.router.consumer("evaluations", capacity=100)
        self.evaluations.add_producer(self.stage.spec.peer)
        return self

    async def problems(self) -> list[Item]:
        return [await self.evaluations.get() for _ in range(TICKETS)]

    def answer(self, items: list[Item], reward: float = 1.0) -> None:
        for item in items:
            size = item.payload["size"]
            lines = [{"step": item.payload["step"], "text": "x"}] * size
            item.ack(
                {
                    "problem": item.payload["problem"],
                    "mode": item.payload["mode"],
                    "rewards": [reward] * size,
                    "infos": [{"correct": reward}] * size,
                    "tokens": [3] * size,
                    "lines": lines if item.payload["record"] else [],
                    "video": b"",
                }
            )

    async def told(self, count: int = 1) -> dict[str, Any]:
        """The line of the evaluation that was reported last of so many."""
        events = lambda: [e for e in self.stage.of(JobEvent) if e.kind == "eval"]  # noqa: E731
        await self.stage.until(lambda: len(events()) >= count)
        return events()[count - 1].data

    def lines(self) -> list[tuple[int, int]]:
        """(step, attempt) of every evaluation in metrics.jsonl."""
        return [(line["step"], line["attempt"]) for line in self.steps() if "eval_problems" in line]


def eval_config(**sections: Any) -> Any:
    return conductor_config(**{"eval": EVAL, "checkpoint": {"every_steps": 5}, **sections})


def test_training_goes_on_beside_it_as_far_as_its_weights_last(run: Run, tmp_path: Path) -> None:
    """With the version of its step exactly; no group at a later one, and no commit beyond, before it is recorded."""

    async def main() -> None:
        async with EvalPlay(tmp_path, eval_config(job={"max_staleness": 1})) as play:
            await play.trainer_comes()
            items = await play.problems()
            assert {(i.payload["version"], i.payload["run_attempt"]) for i in items} == {(0, 0)}
            assert {i.payload["size"] for i in items if i.payload["mode"] == "sampled"} == {2}
            for _ in range(2):  # steps 0 and 1, whose groups were issued at version 0
                await play.whole_step(commit=False)
            await play.stage.until(lambda: len(play.metrics_text().splitlines()) == 2)
            assert play.tickets.get_nowait() is None
            assert not play.trainer.of(StepRecorded)
            play.answer(items)
            line = await play.told()
            assert (line["step"], line["eval_reward_mean"], line["eval_greedy"]) == (0, 1.0, 1.0)
            # Version 2 is due too: its groups are issued, and what goes beyond step 2 waits for it.
            second = await play.problems()
            assert {i.payload["version"] for i in second} == {2}
            assert (await play.trainer.take(StepRecorded)).step == 1
            assert len(await play.take(4)) == 4
            play.answer(second)
            await play.told(2)
            assert play.lines() == [(0, 0), (2, 0)]
            whole = json.loads(evaluation_file(tmp_path, 2).read_text())
            assert whole["rewards"]["greedy"] == [[1.0], [1.0]]
            samples = (tmp_path / "eval_samples.jsonl").read_text().splitlines()
            assert len(samples) == 2 * 2 * 3, (
                "both evaluations recorded 2 problems: 2 samples and 1"
            )

    run(main)


def test_one_that_was_cut_is_taken_again_and_told_once(run: Run, tmp_path: Path) -> None:
    """The trainer dies: its commit is not beyond the step, and the new run attempt evaluates the version anew."""

    async def main() -> None:
        async with EvalPlay(tmp_path, eval_config()) as play:
            await play.trainer_comes()
            held = await play.problems()
            play.answer(held[:3])
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            again = await play.problems()
            assert {i.payload["run_attempt"] for i in again} == {1}
            assert held[3].cancelled
            held[3].ack()
            play.answer(again, reward=0.0)
            assert (await play.told())["eval_reward_mean"] == 0.0
            # Recorded now: another rollback to the same commit has the same weights.
            play.trainer_dies()
            await play.trainer_comes(epoch=2)
            await play.take(2)
            assert play.evaluations.get_nowait() is None
            assert play.lines() == [(0, 1)]

    run(main)


def test_one_of_a_step_that_was_rolled_back_is_taken_again(run: Run, tmp_path: Path) -> None:
    """The step is trained again, with other weights perhaps; its first result no longer counts."""

    async def main() -> None:
        async with EvalPlay(tmp_path, eval_config()) as play:
            await play.trainer_comes()
            play.answer(await play.problems())
            for _ in range(2):
                await play.whole_step(commit=False)
            play.answer(await play.problems(), reward=0.25)
            await play.told(2)
            assert recorded_evaluations(tmp_path)[2]["eval_reward_mean"] == 0.25
            play.trainer_dies()
            await play.trainer_comes(epoch=1)
            assert list(recorded_evaluations(tmp_path)) == [0]
            for _ in range(2):
                await play.whole_step(commit=False)
            play.answer(await play.problems(), reward=0.5)
            await play.told(3)
            assert play.lines() == [(0, 0), (2, 0), (2, 1)]
            assert recorded_evaluations(tmp_path)[2]["eval_reward_mean"] == 0.5

    run(main)


def test_the_last_policy_is_evaluated_before_the_job_ends(run: Run, tmp_path: Path) -> None:
    """Whether the commit or the evaluation is done first; the ledger knows of groups alone."""

    async def main() -> None:
        async with EvalPlay(
            tmp_path, eval_config(job={"steps": 3}, eval={**EVAL, "every_steps": 5})
        ) as play:
            await play.trainer_comes()
            play.answer(await play.problems())
            for _ in range(2):
                await play.whole_step()
            await play.whole_step(commit=False)
            last = await play.problems()
            assert {i.payload["version"] for i in last} == {3}
            await play.trainer.take(CommitAndPause)
            play.commit_on_disk()
            play.say_committed()
            await play.stage.until(
                lambda: any(
                    e.kind == "commit" and e.data["step"] == 3 for e in play.stage.of(JobEvent)
                )
            )
            assert not play.stage.of(JobFinished)
            play.answer(last)
            assert (await play.stage.heard(JobFinished)).state == "done"
            assert play.lines() == [(0, 0), (3, 0)]
            assert await play.stage.life == 0
            report = audit(tmp_path, finished=True)
            assert report.ok, report.problems
            assert report.counts["groups"] == 6

    run(main)


def test_a_job_that_was_cut_in_its_last_evaluation_takes_it_when_it_comes_back(
    run: Run, tmp_path: Path
) -> None:
    """All steps are trained; the trainer publishes what it has, for the evaluation alone."""

    async def main() -> None:
        config = eval_config(job={"steps": 1}, eval={**EVAL, "every_steps": 5})
        async with EvalPlay(tmp_path, config) as play:
            await play.trainer_comes()
            play.answer(await play.problems())
            await play.whole_step()
            await play.problems()
            play.trainer_dies()
            assert not play.stage.of(JobFinished)
            await play.trainer_comes(epoch=1)
            assert play.trainer.of(BeginRun)[0].step == 1
            play.answer(await play.problems())
            assert (await play.stage.heard(JobFinished)).state == "done"
            assert play.lines() == [(0, 0), (1, 1)]

    run(main)


def test_a_job_of_no_steps_evaluates_the_model_and_ends(run: Run, tmp_path: Path) -> None:
    """No trainer is waited for; rollout actors are told that their weights are the ones."""

    async def main() -> None:
        async with EvalPlay(
            tmp_path, eval_config(job={"steps": 0}, eval={**EVAL, "every_steps": 0})
        ) as play:
            rollout = await play.stage.meet("rollout-0", "rollout")
            assert (await rollout.take(WeightsPublished)).policy_version == 0
            play.answer(await play.problems())
            finished = await play.stage.heard(JobFinished)
            assert (finished.state, finished.reason) == ("done", "the model was evaluated")
            assert play.lines() == [(0, 0)]

    run(main)


def test_a_problem_that_its_env_actor_lost_is_played_by_another(run: Run, tmp_path: Path) -> None:
    """Like any ticket: delivered again, answered once."""

    async def main() -> None:
        async with EvalPlay(tmp_path, eval_config(job={"steps": 0})) as play:
            await play.problems()
            play.stage.lose("env-0")
            env = await play.stage.meet("env-1", "env")
            play.evaluations = env.router.consumer("evaluations", capacity=100)
            play.evaluations.add_producer(play.stage.spec.peer)
            again = await play.problems()
            assert {item.attempt for item in again} == {2}
            play.answer(again)
            await play.told()
            assert len(play.lines()) == 1

    run(main)


def test_without_the_section_nothing_is_evaluated(run: Run, tmp_path: Path) -> None:
    """The default."""

    async def main() -> None:
        async with EvalPlay(tmp_path, conductor_config(job={"steps": 1})) as play:
            await play.trainer_comes()
            await play.whole_step()
            await play.stage.heard(JobFinished)
            assert play.evaluations.get_nowait() is None
            assert play.lines() == []
            await asyncio.sleep(0)

    run(main)
