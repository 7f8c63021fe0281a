"""The env actor, driven by a conductor, a rollout actor and a trainer that the tests play."""

import asyncio
import importlib
import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from actor_stage import Peer, Stage, job_config

from actors.episodes import Action, Group, Sampling
from actors.job_config import JobConfig
from channels.channel import Consumer, Item, Producer
from channels.errors import Withdrawn
from channels.lifecycle import Failed, FirstOutput, JobEvent
from channels.work import StageTimes
from sim.contract import ChatMessage, StepResult, TextObservation, split_counted_seed

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Counting:
    """Episodes that end when the policy says "end", and are cut by the task when it says "cut"."""

    def __init__(self, *, num_slots: int) -> None:
        self.num_slots = num_slots
        self.turns: dict[int, int] = {}
        self.log: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.closed = False

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[TextObservation]:
        self.log.append(("reset", tuple(slots), tuple(seeds)))
        assert set(slots) <= set(range(self.num_slots))
        self.turns.update(dict.fromkeys(slots, 0))
        return [say(f"seed {seed}") for seed in seeds]

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        self.log.append(("step", tuple(slots), tuple(actions)))
        results = []
        for slot, action in zip(slots, actions, strict=True):
            self.turns[slot] += 1
            results.append(
                StepResult(
                    observation=say(f"after {action}"),
                    reward=float(self.turns[slot]),
                    terminated=action == "end",
                    truncated=action == "cut",
                    info={"turns": float(self.turns[slot])},
                )
            )
        return results

    def close(self) -> None:
        self.closed = True


def say(text: str) -> TextObservation:
    return TextObservation(messages=(ChatMessage(role="user", content=text),))


def action(text: str, prompt: Sequence[int], tokens: Sequence[int]) -> Action:
    return Action(
        prompt=np.array(prompt, dtype=np.int32),
        tokens=np.array(tokens, dtype=np.int32),
        logprobs=np.zeros(len(tokens), dtype=np.float32),
        versions=np.zeros(len(tokens), dtype=np.int32),
        mask=np.ones(len(tokens), dtype=np.bool_),
        text=text,
    )


def ticket(group: int = 0, **given: Any) -> dict[str, Any]:
    return {
        "group": group,
        "attempt": 0,
        "run_attempt": 0,
        "seed": 100 + group,
        "step": group // 2,
        "version": 3,
        "exact": True,
        "group_size": 2,
        **given,
    }


def env_config(**sections: Any) -> JobConfig:
    env = {"task": "test_env_actor:Counting", "max_turns": 3, **sections.pop("env", {})}
    return job_config(env=env, **sections)


class Play:
    """An env actor and its three kinds of peers."""

    def __init__(self, tmp_path: Path, config: JobConfig) -> None:
        self.stage = Stage(tmp_path, "env", config)
        self.conductor: Peer
        self.rollout: Peer
        self.trainer: Peer
        self.tickets: Producer
        self.requests: Consumer
        self.groups: Consumer

    async def __aenter__(self) -> "Play":
        # The actor imports the task by name; pytest has put its folder on the path.
        importlib.import_module("test_env_actor")
        await self.stage.__aenter__()
        self.conductor = await self.stage.meet("conductor", "conductor")
        self.tickets = self.conductor.router.producer("tickets", bound=8)
        self.tickets.add_consumer(self.stage.spec.peer)
        await self.rollout_comes()
        await self.trainer_comes()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.stage.__aexit__(*error)

    async def rollout_comes(self, name: str = "rollout-0", epoch: int = 0) -> None:
        self.rollout = await self.stage.meet(name, "rollout", epoch=epoch)
        self.requests = self.rollout.router.consumer("requests", capacity=8)
        self.requests.add_producer(self.stage.spec.peer)

    async def trainer_comes(self, epoch: int = 0) -> None:
        self.trainer = await self.stage.meet("trainer-0", "trainer", epoch=epoch)
        self.groups = self.trainer.router.consumer("groups", capacity=8)
        self.groups.add_producer(self.stage.spec.peer)

    @property
    def env(self) -> Any:
        return self.stage.actor.hosts.env

    async def answer(self, *texts: str | None) -> Item:
        """Take a request and answer its samples; the tokens say who answered what and when."""
        item = await self.requests.get()
        payload = item.payload
        assert len(payload.samples) == len(texts)
        item.ack(
            [
                None
                if text is None
                else action(
                    text,
                    [1000 + payload.turn, sample.sample],
                    [2000 + payload.turn, sample.sample, len(text)],
                )
                for sample, text in zip(payload.samples, texts, strict=True)
            ]
        )
        return item


def test_a_group_from_ticket_to_trainer(run: Run, tmp_path: Path) -> None:
    """Turn by turn: histories grow by exactly prompt and tokens, ended episodes take no further part."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            call = asyncio.create_task(play.tickets.call(ticket(4)))
            first = (await play.answer("go", "end")).payload
            assert (first.group, first.attempt, first.run_attempt, first.turn) == (4, 0, 0, 0)
            assert (first.version, first.exact) == (3, True)
            assert [s.sample for s in first.samples] == [0, 1]
            assert all(len(s.history) == 0 for s in first.samples)
            assert all(s.observation == say("seed 104") for s in first.samples)
            second = (await play.answer("cut")).payload
            (sample,) = second.samples
            assert (second.turn, sample.sample) == (1, 0)
            assert sample.history.tolist() == [1000, 0, 2000, 0, 2]
            assert sample.observation == say("after go")
            item = await play.groups.get()
            group: Group = item.payload
            assert not call.done(), "the ticket is open until the trainer holds the group"
            item.ack()
            assert await call is None
            assert (group.group, group.attempt, group.seed) == (4, 0, 104)
            cut, ended = group.segments
            assert [turn.action.text for turn in cut.turns] == ["go", "cut"]
            assert [turn.observation for turn in cut.turns] == [say("seed 104"), say("after go")]
            assert [turn.reward for turn in cut.turns] == [1.0, 2.0]
            assert (cut.terminated, cut.truncated) == (False, True)
            assert cut.bootstrap == say("after cut")
            assert cut.info == {"turns": 2.0}
            assert (ended.terminated, ended.truncated, ended.bootstrap) == (True, False, None)
            assert play.env.log[0] == ("reset", (0, 1), (104, 104))
            await play.stage.heard(FirstOutput)

    run(main)


def test_the_last_turn_truncates(run: Run, tmp_path: Path) -> None:
    """After max_turns an episode that goes on is cut, with the true last observation to bootstrap from."""

    async def main() -> None:
        async with Play(tmp_path, env_config(env={"max_turns": 2})) as play:
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("a", "b")
            await play.answer("c", "end")
            item = await play.groups.get()
            item.ack()
            await call
            cut, ended = item.payload.segments
            assert (cut.terminated, cut.truncated) == (False, True)
            assert cut.bootstrap == say("after c")
            assert (ended.terminated, ended.truncated) == (True, False)

    run(main)


def test_no_room_for_another_turn_truncates(run: Run, tmp_path: Path) -> None:
    """An answer of None ends the episode where it stands: the environment is not stepped."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("go", "go")
            await play.answer(None, "end")
            item = await play.groups.get()
            item.ack()
            await call
            full, ended = item.payload.segments
            assert [turn.action.text for turn in full.turns] == ["go"]
            assert full.truncated
            assert full.bootstrap == say("after go")
            assert ended.terminated
            assert play.env.log[-1] == ("step", (1,), ("end",))

    run(main)


def test_groups_are_played_side_by_side_in_slots_of_their_own(run: Run, tmp_path: Path) -> None:
    """Two groups at a time use different slots; a third one waits for a place."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            calls = [asyncio.create_task(play.tickets.call(ticket(g))) for g in range(3)]
            one, two = await play.requests.get(), await play.requests.get()
            assert {one.payload.group, two.payload.group} == {0, 1}
            assert play.requests.get_nowait() is None
            resets = [entry for entry in play.env.log if entry[0] == "reset"]
            assert {slot for _, slots, _ in resets for slot in slots} == {0, 1, 2, 3}
            for item in (two, one):
                item.ack([action("end", [1], [2]) for _ in range(2)])
            groups = [await play.groups.get() for _ in range(2)]
            for item in groups:
                item.ack()
            await play.answer("end", "end")
            (await play.groups.get()).ack()
            await asyncio.gather(*calls)
            assert sorted(play.stage.actor.hosts.free) == [0, 1, 2, 3]

    run(main)


def test_groups_that_come_together_are_one_call(run: Run, tmp_path: Path) -> None:
    """The environment is called once for all that waits, and each group gets what is its own."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            hosts, env = play.stage.actor.hosts, play.env
            first, second = await asyncio.gather(
                hosts.call("reset", [1, 0], [7, 8]), hosts.call("reset", [3], [9])
            )
            assert env.log == [("reset", (1, 0, 3), (7, 8, 9))]
            assert (first, second) == ([say("seed 7"), say("seed 8")], [say("seed 9")])
            given_up = asyncio.create_task(hosts.call("step", [1], ["end"]))
            stepped = asyncio.create_task(hosts.call("step", [3], ["cut"]))
            again = asyncio.create_task(hosts.call("reset", [0], [6]))
            await asyncio.sleep(0)  # they have asked
            given_up.cancel()
            assert [result.truncated for result in await stepped] == [True]
            assert await again == [say("seed 6")]
            assert env.log[1:] == [("step", (3,), ("cut",)), ("reset", (0,), (6,))]

    run(main)


def test_environment_that_counts_is_reset_with_the_groups_index(run: Run, tmp_path: Path) -> None:
    """Above the index the job's own bits; whatever the random seed of the ticket is."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            play.env.counted_seeds = True
            call = asyncio.create_task(play.tickets.call(ticket(4)))
            await play.answer("end", "end")
            (await play.groups.get()).ack()
            await call
            ((_, _, seeds), *_) = play.env.log
            job_seed = play.stage.actor.config.job.seed
            assert {split_counted_seed(seed) for seed in seeds} == {(job_seed, 4)}

    run(main)


def test_urgent_steps_go_first(run: Run, tmp_path: Path) -> None:
    """Requests and groups carry their step: the next one to be trained overtakes."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            calls = [
                asyncio.create_task(play.tickets.call(ticket(step=s, group=s))) for s in (5, 2)
            ]
            items = [await play.requests.get() for _ in range(2)]
            assert sorted(item.priority for item in items) == [-5, -2]
            assert {item.key for item in items} == {"5", "2"}
            for item in items:
                item.ack([action("end", [1], [2]) for _ in range(2)])
            groups = [await play.groups.get() for _ in range(2)]
            assert sorted(item.priority for item in groups) == [-5, -2]
            for item in groups:
                item.ack()
            await asyncio.gather(*calls)

    run(main)


@pytest.mark.parametrize("when", ["acting", "delivering"])
def test_a_cancelled_ticket_stops_its_group(run: Run, tmp_path: Path, when: str) -> None:
    """Its request or delivery is withdrawn, its slots are free, its place is given back."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            call = asyncio.create_task(play.tickets.call(ticket(0)))
            if when == "delivering":
                await play.answer("end", "end")
                held = await play.groups.get()
            else:
                held = await play.requests.get()
            assert play.tickets.cancel(lambda pending: True) == 1
            with pytest.raises(Withdrawn):
                await call
            await held.wait_cancelled()
            held.ack()
            await play.stage.until(lambda: play.tickets.statistics().in_flight == 0)
            assert sorted(play.stage.actor.hosts.free) == [0, 1, 2, 3]
            call = asyncio.create_task(play.tickets.call(ticket(1)))
            await play.answer("end", "end")
            (await play.groups.get()).ack()
            await call

    run(main)


def test_what_a_dead_rollout_held_goes_to_another(run: Run, tmp_path: Path) -> None:
    """The same request, with the same history: nothing that was played is lost."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("go", "end")
            held = await play.requests.get()
            play.stage.lose("rollout-0")
            await play.rollout_comes("rollout-1")
            again = await play.answer("end")
            assert again.attempt == 2
            assert again.payload.turn == 1
            np.testing.assert_array_equal(
                again.payload.samples[0].history, held.payload.samples[0].history
            )
            (await play.groups.get()).ack()
            await call

    run(main)


def test_what_a_dead_trainer_held_goes_to_its_successor(run: Run, tmp_path: Path) -> None:
    """A group that was delivered and not acknowledged is delivered again."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("end", "end")
            lost = (await play.groups.get()).payload
            play.stage.lose("trainer-0")
            await play.trainer_comes(epoch=1)
            item = await play.groups.get()
            assert item.payload is lost
            item.ack()
            await call

    run(main)


def test_other_ranks_of_the_trainer_get_no_groups(run: Run, tmp_path: Path) -> None:
    """Only the leader pulls; losing another rank takes nothing away from it."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            other = await play.stage.meet("trainer-0.1", "trainer", rank=1)
            groups = other.router.consumer("groups", capacity=8)
            groups.add_producer(play.stage.spec.peer)
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("end", "end")
            (await play.groups.get()).ack()
            await call
            play.stage.lose("trainer-0.1")
            call = asyncio.create_task(play.tickets.call(ticket(1)))
            await play.answer("end", "end")
            (await play.groups.get()).ack()
            await call
            assert groups.get_nowait() is None

    run(main)


def test_asked_to_leave_it_gives_its_tickets_back(run: Run, tmp_path: Path) -> None:
    """Another env actor plays them from the start; the environment is closed."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("go", "go")
            held = await play.requests.get()
            env = play.env
            assert await play.stage.stop() == 0
            assert env.closed
            assert held.cancelled
            assert not call.done()
            assert play.tickets.statistics().depth == 1
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(main)


def test_a_task_that_raises_ends_the_actor_with_its_error(run: Run, tmp_path: Path) -> None:
    """The user sees the task's own error, not a group of them."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:

            def broken(slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
                raise ZeroDivisionError("reward per second")

            play.env.step = broken
            call = asyncio.create_task(play.tickets.call(ticket()))
            await play.answer("go", "go")
            assert play.stage.life is not None
            assert await play.stage.life == 1
            (failed,) = play.stage.of(Failed)
            assert failed.error == "ZeroDivisionError: reward per second"
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(main)


def test_times_are_told_once_a_step(run: Run, tmp_path: Path) -> None:
    """The conductor hears how the actor's time divides; the shares add up to its life."""

    async def main() -> None:
        async with Play(tmp_path, env_config()) as play:
            for group in range(4):  # two a step
                call = asyncio.create_task(play.tickets.call(ticket(group)))
                await play.answer("end", "end")
                (await play.groups.get()).ack()
                await call
            assert len(play.conductor.of(StageTimes)) == 2
            seconds = play.conductor.of(StageTimes)[-1].seconds
            assert {"work", "wait_rollout", "wait_tickets"} <= set(seconds)
            assert all(value >= 0 for value in seconds.values())

    run(main)


@pytest.fixture
def worker_tasks(monkeypatch: pytest.MonkeyPatch) -> str:
    """A task that does as it is told, where worker processes find it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sim"))
    return "worker_tasks:Obedient"


def test_each_ready_part_goes_on_while_others_step(
    run: Run, tmp_path: Path, worker_tasks: str
) -> None:
    """A group whose worker is done is delivered while another worker is still in its step."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def main() -> None:
        config = env_config(env={"task": worker_tasks, "workers": 2})
        async with Play(tmp_path, config) as play:
            slow = asyncio.create_task(play.tickets.call(ticket(0)))
            first = await play.answer(f"wait {pipe}", "stand")
            quick = asyncio.create_task(play.tickets.call(ticket(1)))
            second = await play.answer("stand", "stand")
            assert (first.payload.group, second.payload.group) == (0, 1)
            (await play.groups.get()).ack()
            await quick
            assert not slow.done()
            pipe.write_text("")  # now the slow one goes on
            await play.answer("stand")
            item = await play.groups.get()
            item.ack()
            await slow
            assert item.payload.group == 0
            pids = {segment.info["pid"] for segment in item.payload.segments}
            assert len(pids) == 1  # a group that fits one worker is stepped there

    run(main)


def test_a_group_whose_worker_died_is_played_again(
    run: Run, tmp_path: Path, worker_tasks: str
) -> None:
    """From the start, as it was issued; the other worker's group does not notice, flowd is told."""
    died = tmp_path / "died"

    async def main() -> None:
        config = env_config(env={"task": worker_tasks, "workers": 2})
        async with Play(tmp_path, config) as play:
            calls = [asyncio.create_task(play.tickets.call(ticket(group))) for group in range(2)]
            items = [await play.requests.get() for _ in range(2)]
            by_group = {item.payload.group: item for item in items}
            texts = {0: [f"segfault once {died}", "walk"], 1: ["walk", "walk"]}
            for group, item in by_group.items():
                item.ack([action(text, [1], [2]) for text in texts[group]])
            turns = []
            for _ in range(3):  # two turns of group 0 from its start, the second one of group 1
                item = await play.requests.get()
                turns.append((item.payload.group, item.payload.turn))
                text = "walk" if (item.payload.group, item.payload.turn) == (0, 0) else "stand"
                item.ack([action(text, [1], [2]) for _ in item.payload.samples])
            assert sorted(turns) == [(0, 0), (0, 1), (1, 1)]
            for _ in range(2):
                item = await play.groups.get()
                assert [len(segment.turns) for segment in item.payload.segments] == [2, 2]
                item.ack()
            await asyncio.gather(*calls)
            (told,) = [event for event in play.stage.of(JobEvent) if event.kind == "group_lost"]
            assert told.data["group"] == 0
            assert "SIGSEGV" in told.data["reason"]
            assert play.stage.actor.counters["groups_lost"] == 1

    run(main)


def test_a_group_that_kills_every_worker_ends_the_actor(
    run: Run, tmp_path: Path, worker_tasks: str
) -> None:
    """With the seed, and how the last one died; no worker is left."""
    pids: list[int] = []

    async def main() -> None:
        config = env_config(env={"task": worker_tasks, "workers": 1})
        async with Play(tmp_path, config) as play:
            call = asyncio.create_task(play.tickets.call(ticket()))
            for _ in range(3):
                await play.answer("segfault", "walk")
            assert play.stage.life is not None
            assert await play.stage.life == 1
            (failed,) = play.stage.of(Failed)
            assert "group 0 (seed 0) lost its worker 3 times" in failed.error
            assert "SIGSEGV" in failed.error
            pids.extend(part.pid for part in play.env.parts)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    run(main)
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()


def evaluation(problem: int = 0, mode: str = "sampled", **given: Any) -> dict[str, Any]:
    greedy = mode == "greedy"
    return {
        "problem": problem,
        "mode": mode,
        "size": 1 if greedy else 3,
        "temperature": 0.0 if greedy else 0.7,
        "top_k": 0,
        "step": 6,
        "version": 6,
        "attempt": 1,
        "run_attempt": 1,
        "record": True,
        "filmed": False,
        **given,
    }


def test_a_problem_of_an_evaluation(run: Run, tmp_path: Path) -> None:
    """Played beside groups in an environment of its own, as its ticket says; what came of it is the answer."""

    async def main() -> None:
        config = env_config(eval={"every_steps": 2, "k": 3, "seed": 5})
        async with Play(tmp_path, config) as play:
            problems = play.conductor.router.producer("evaluations", bound=8)
            problems.add_consumer(play.stage.spec.peer)
            group = asyncio.create_task(play.tickets.call(ticket(0)))
            held = await play.requests.get()
            sampled = asyncio.create_task(problems.call(evaluation(4)))
            first = await play.answer("go", "end", "cut")
            assert first.priority > held.priority
            asked = first.payload
            assert (asked.version, asked.exact, asked.run_attempt) == (6, True, 1)
            assert asked.sampling == Sampling(temperature=0.7)
            await play.answer("end")
            answer = await sampled
            assert (answer["problem"], answer["mode"]) == (4, "sampled")
            assert answer["rewards"] == [3.0, 1.0, 1.0]
            assert [info["turns"] for info in answer["infos"]] == [2.0, 1.0, 1.0]
            assert answer["tokens"] == [6, 3, 3]
            assert [(line["sample"], line["turn"]) for line in answer["lines"]] == [
                (0, 0),
                (0, 1),
                (1, 0),
                (2, 0),
            ]
            assert {(line["step"], line["attempt"]) for line in answer["lines"]} == {(6, 1)}
            greedy = asyncio.create_task(problems.call(evaluation(4, "greedy", record=False)))
            second = await play.answer("end")
            assert second.payload.sampling == Sampling(temperature=0.0)
            assert second.payload.key == asked.key
            assert second.payload.samples[0].observation == asked.samples[0].observation
            assert (await greedy)["lines"] == []
            seeds = {seed for name, _, values in play.env.log for seed in values if name == "reset"}
            assert seeds == {100}, "the environment of training saw the group alone"
            held.ack([action("end", [1], [2]) for _ in range(2)])
            (await play.groups.get()).ack()
            await group
            hosts = play.stage.actor.eval_hosts
            assert sorted(hosts.free) == list(range(6))
            assert await play.stage.stop() == 0
            assert hosts.env.closed
            assert hosts.env is not play.env

    run(main)


def test_a_job_of_no_steps_opens_the_environment_of_evaluations_alone(
    run: Run, tmp_path: Path
) -> None:
    """A simulator is not started twice where one is never played."""

    async def main() -> None:
        async with Play(tmp_path, env_config(job={"steps": 0})) as play:
            assert len(play.stage.actor.opened) == 1

    run(main)
