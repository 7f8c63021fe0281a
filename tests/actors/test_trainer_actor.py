"""The trainer with a tiny model, driven by a conductor and an env actor that the tests play."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from actor_stage import JOB, TINY, Peer, Stage, job_config

from actors.backends.contract import CRITIC_WEIGHTS
from actors.backends.reference_file import FILE
from actors.conductor.group_set import GroupSet
from actors.conductor.manifest import Manifest, checkpoint_dir, newest_manifest, write_manifest
from actors.episodes import Action, Group, PolicyReading, Segment, Turn
from actors.job_config import JobConfig
from actors.models.config import LoraConfig
from actors.models.loading import build_model, save_pretrained_folder
from actors.trainer import building
from actors.trainer.checkpoint import CheckpointWriter
from actors.trainer.shard_files import Shards
from channels.channel import Producer
from channels.inline import InlineHub
from channels.lifecycle import Failed, FirstOutput, LeaseIdle, LeaseWanted, Ready
from channels.weights import WeightsDirectory, WeightsPublished
from channels.work import (
    Admit,
    BeginRun,
    CommitAndPause,
    Committed,
    Drop,
    GroupReceived,
    Paused,
    StepDone,
    StepRecorded,
    TrainerReady,
)
from sim.contract import ChatMessage, TextObservation

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

torch.set_num_threads(1)
VOCABULARY = 90


def make_group(index: int, *, attempt: int = 0, run_attempt: int = 0, **given: Any) -> Group:
    """Two samples with different rewards; tokens, log-probs and versions depend on the index alone."""
    rng = np.random.default_rng(index)
    segments = []
    for sample in range(2):
        length = int(rng.integers(2, 6))
        logprobs = np.full(length, -4.5, dtype=np.float32)
        action = Action(
            prompt=rng.integers(8, VOCABULARY, 5).astype(np.int32),
            tokens=rng.integers(8, VOCABULARY, length).astype(np.int32),
            logprobs=given.get("logprobs", logprobs[0]) * np.ones(length, dtype=np.float32),
            versions=np.full(
                length, given.get("version", 0) + (sample if index == 7 else 0), np.int32
            ),
            mask=np.ones(length, dtype=np.bool_),
            text=f"text {index}.{sample}",
        )
        observation = TextObservation(messages=(ChatMessage(role="user", content=f"ask {index}"),))
        segments.append(
            Segment(
                sample=sample,
                turns=(Turn(observation=observation, action=action, reward=float(sample)),),
                info={"correct": float(sample), "answer": "12"},
            )
        )
    return Group(
        group=index,
        attempt=attempt,
        run_attempt=run_attempt,
        seed=index,
        segments=tuple(segments),
    )


class Play:
    """A trainer, with the conductor and the env actor that the test moves."""

    def __init__(self, run_dir: Path, config: JobConfig, **given: Any) -> None:
        given = {"devices": ("cpu:0",), **given}
        self.stage = Stage(run_dir, "trainer", config, **given)
        self.directory = WeightsDirectory(run_dir / "weights", keep=9)
        self.admitted: dict[int, int] = {}
        self.recording = True  # the conductor writes every step down at once
        self.conductor: Peer
        self.env: Peer
        self.groups: Producer

    async def __aenter__(self) -> "Play":
        await self.stage.__aenter__()
        self.env = await self.stage.meet("env-0", "env")
        self.groups = self.env.router.producer("groups", bound=64)
        self.groups.add_consumer(self.stage.spec.peer)
        self.conductor = await self.stage.meet("conductor", "conductor")
        self.conductor.router.on_message = self._to_conductor
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.stage.__aexit__(*error)

    def _to_conductor(self, sender: str, message: Any, payload: Any) -> None:
        self.conductor._received(sender, message, payload)
        if isinstance(message, StepDone) and self.recording:
            self.say(StepRecorded(run_attempt=message.run_attempt, step=message.step))

    def say(self, message: Any) -> None:
        self.conductor.endpoint.send(self.stage.spec.peer, message)

    async def begin(self, run_attempt: int = 0) -> WeightsPublished:
        ready = await self.conductor.take(TrainerReady)
        count = len(self.conductor.of(WeightsPublished))
        self.say(BeginRun(run_attempt=run_attempt, step=ready.step))
        return await self.conductor.take(WeightsPublished, count + 1)

    async def deliver(self, *groups: Group) -> list[GroupReceived]:
        count = len(self.conductor.of(GroupReceived))
        for group in groups:
            await self.groups.call(group)
        await self.conductor.take(GroupReceived, count + len(groups))
        return self.conductor.of(GroupReceived)[count:]

    def admit(self, step: int, *groups: int, last: bool = False, commit: bool = True) -> None:
        for group in groups:
            order = self.admitted.get(step, 0)
            self.admitted[step] = order + 1
            self.say(
                Admit(
                    group=group,
                    attempt=0,
                    step=step,
                    order=order,
                    last=last and group == groups[-1],
                    commit=commit,
                )
            )

    async def step_done(self, count: int = 1) -> StepDone:
        return await self.conductor.take(StepDone, count)


def trained_by_hand(config: JobConfig, stage: Stage, steps: Sequence[Sequence[int]]) -> Any:
    """The weights after these steps, from the engine alone."""
    engine = building.build_engine(stage.spec, config)
    for groups in steps:
        engine.begin_step()
        engine.accumulate([make_group(group) for group in groups])
        engine.finish_step()
    return dict(engine.weights())


def assert_weights(directory: WeightsDirectory, version: int, expected: Any) -> None:
    published = directory.load(0, version)
    assert published.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(published[name], tensor, rtol=1e-5, atol=1e-7)


def differ(one: Any, other: Any) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


class RecordingWriter(CheckpointWriter):
    """A rank's writer without the group of ranks, which are in one process here: each writes as if it were alone."""

    def __init__(self, spec: Any, config: JobConfig) -> None:
        ranks_own = Path(spec.run_dir) / f"rank-{spec.rank}" if spec.rank else Path(spec.run_dir)
        super().__init__(ranks_own, config.checkpoint)
        self.calls: list[Any] = []
        self.disk = threading.Event()  # it is slow while this is not set
        self.disk.set()

    def stage(self, step: int, *given: Any) -> None:
        self.calls.append(step)
        super().stage(step, *given)

    def write(self, **given: Any) -> None:
        assert self.disk.wait(20)
        self.calls.append("write")
        super().write(**given)

    def commit(self, manifest: Manifest) -> None:
        self.calls.append("commit")
        super().commit(manifest)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> dict[int, RecordingWriter]:
    """The checkpoint writer of each rank."""
    made: dict[int, RecordingWriter] = {}

    def build(spec: Any, config: JobConfig) -> RecordingWriter:
        return made.setdefault(spec.rank, RecordingWriter(spec, config))

    monkeypatch.setattr(building, "build_checkpoint_writer", build)
    return made


def test_the_first_commit_is_the_model_as_it_was_made(run: Run, tmp_path: Path) -> None:
    """Ready at step 0; BeginRun publishes version 0 under the run attempt it names."""

    async def main() -> None:
        config = job_config()
        async with Play(tmp_path, config) as play:
            ready = await play.conductor.take(TrainerReady)
            assert (ready.epoch, ready.step, ready.run_attempt) == (0, 0, 0)
            assert newest_manifest(tmp_path) == Manifest(step=0, policy_version=0, run_attempt=0)
            published = await play.begin()
            assert (published.run_attempt, published.policy_version) == (0, 0)
            model, _ = build_model(config.model, seed=config.job.seed)
            parameters = {name: p.detach() for name, p in model.named_parameters()}
            assert_weights(play.directory, 0, parameters)

    run(main)


def test_a_group_is_announced_with_what_the_conductor_needs(run: Run, tmp_path: Path) -> None:
    """Versions from oldest to newest, tokens, rewards per sample, means of the numbers in info."""

    async def main() -> None:
        async with Play(tmp_path, job_config()) as play:
            await play.begin()
            group = make_group(7, version=3, run_attempt=0)
            (received,) = await play.deliver(group)
            assert received == GroupReceived(
                group=7,
                attempt=0,
                run_attempt=0,
                min_version=3,
                max_version=4,
                tokens=group.num_tokens,
                rewards=[0.0, 1.0],
                info={"correct": 0.5},
            )

    run(main)


@pytest.mark.parametrize("micro_batch_tokens", [16384, 1])
def test_interleaved_steps_train_their_own_groups(
    run: Run, tmp_path: Path, micro_batch_tokens: int
) -> None:
    """Admissions of two steps come mixed: each step has its groups, in order, streamed or in one piece."""

    async def main() -> None:
        config = job_config(
            job={"groups_per_step": 3, "max_staleness": 1},
            trainer={"micro_batch_tokens": micro_batch_tokens},
        )
        async with Play(tmp_path, config) as play:
            await play.begin()
            await play.deliver(*(make_group(group) for group in range(6)))
            play.admit(1, 1)
            play.admit(0, 0, 5)
            play.admit(1, 4, 2, last=True)
            assert not play.conductor.of(StepDone)
            play.admit(0, 3, last=True)
            first, second = await play.step_done(), await play.step_done(2)
            assert (first.step, first.policy_version) == (0, 1)
            assert (second.step, second.policy_version) == (1, 2)
            await play.conductor.take(Committed, 2)
            order = [type(m) for m in play.conductor.messages if not isinstance(m, GroupReceived)]
            # The second step need not wait for the first one's commit.
            beside = [kind for kind in order if kind is not Committed]
            step = [WeightsPublished, StepDone]
            assert beside == [TrainerReady, WeightsPublished, *step, *step]
            assert [m.step for m in play.conductor.of(Committed)] == [1, 2]
            manifest = newest_manifest(tmp_path)
            assert manifest is not None
            assert (manifest.step, manifest.groups) == (2, GroupSet.of(range(6)))
            assert_weights(play.directory, 1, trained_by_hand(config, play.stage, [[0, 5, 3]]))
            both = trained_by_hand(config, play.stage, [[0, 5, 3], [1, 4, 2]])
            assert_weights(play.directory, 2, both)
            assert differ(play.directory.load(0, 1), play.directory.load(0, 2))
            assert not play.stage.actor.pool
            await play.stage.heard(FirstOutput)

    run(main)


def test_micro_batches_are_filled_not_overfilled(run: Run, tmp_path: Path) -> None:
    """A chunk ends before it is over the budget, which would leave a small rest: here after five groups."""

    async def main() -> None:
        like = make_group(0)
        size = sum(
            len(turn.action.prompt) + len(turn.action.tokens)
            for segment in like.segments
            for turn in segment.turns
        )
        config = job_config(
            job={"groups_per_step": 8}, trainer={"micro_batch_tokens": 5 * size + size // 2}
        )
        async with Play(tmp_path, config) as play:
            await play.begin()
            engine = play.stage.actor.engine
            accumulate, chunks = engine.accumulate, []

            def recording(groups: Sequence[Group]) -> None:
                chunks.append(len(groups))
                accumulate(groups)

            engine.accumulate = recording
            await play.deliver(*(replace(like, group=group) for group in range(8)))
            play.admit(0, *range(8), last=True)
            await play.step_done()
            assert chunks == [5, 3]

    run(main)


def test_metrics_of_a_step_are_told(run: Run, tmp_path: Path) -> None:
    """Finite numbers of the update, and the seconds that it took."""

    async def main() -> None:
        async with Play(tmp_path, job_config()) as play:
            await play.begin()
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0, 1, last=True)
            metrics = (await play.step_done()).metrics
            tokens = make_group(0).num_tokens + make_group(1).num_tokens
            assert metrics["tokens_trained"] == tokens
            assert metrics["grad_norm"] > 0
            for name in ("loss", "kl_sampler", "learning_rate", "seconds_train", "seconds_step"):
                assert np.isfinite(metrics[name])

    run(main)


@pytest.mark.parametrize("variant", ["full", "delta"])
def test_how_weights_were_published_is_told(run: Run, tmp_path: Path, variant: str) -> None:
    """A small step changes few elements in bfloat16: a delta has fewer bytes. Either way the host copy is whole."""

    async def main() -> None:
        config = job_config(trainer={"weights": variant}, rollout={"dtype": "bfloat16"})
        config = msgspec.structs.replace(
            config, trainer=msgspec.structs.replace(config.trainer, learning_rate=1e-6)
        )
        async with Play(tmp_path, config) as play:
            await play.begin()
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0, 1, last=True)
            done = await play.step_done()
            published = play.conductor.of(WeightsPublished)[-1]
            assert done.weights_variant == published.variant == variant
            assert done.metrics["weights_bytes"] == published.variant_bytes
            assert (published.variant_bytes < published.size_bytes / 2) == (variant == "delta")
            assert 0 < done.metrics["seconds_publish"] < done.metrics["seconds_step"]
            assert differ(play.directory.load(0, 0), play.directory.load(0, 1))
            engine = play.stage.actor.engine
            for name, tensor in engine.weights():
                assert play.directory.load(0, 1)[name].equal(tensor.bfloat16())

    run(main)


LORA = msgspec.structs.replace(TINY, lora=LoraConfig(rank=2))


@pytest.mark.parametrize("folder", [False, True], ids=["made", "folder"])
def test_an_adapter_travels_and_is_committed_alone(run: Run, tmp_path: Path, folder: bool) -> None:
    """Version 0 is the frozen model, of every run attempt; a model without a folder is in the run's directory, once."""
    pytest.importorskip("peft", reason="needs the extra `lora`")
    model, tokenizer = build_model(TINY, seed=3)
    path = tmp_path / "model"
    save_pretrained_folder(model, tokenizer, path)
    config = job_config(
        model=msgspec.structs.replace(LORA, path=str(path) if folder else None),
        job={"deterministic": True, "max_staleness": 1},
    )

    async def main() -> None:
        async with Play(tmp_path, config) as play:
            first = await play.begin()
            assert (first.policy_version, first.variant, first.base) == (0, "full", None)
            for group in range(3):
                await play.deliver(make_group(2 * group), make_group(2 * group + 1))
                play.admit(group, 2 * group, 2 * group + 1, last=True, commit=group != 2)
                done = await play.step_done(group + 1)
            engine = play.stage.actor.engine
            base = play.directory.load(0, 0)
            assert not differ(base, dict(engine.weights()))
            assert done.weights_variant == "adapter"
            assert play.directory.base_of(0, 3) == (0, 0)
            newest = play.directory.load(0, 3)
            assert not differ(newest, engine.adapter())
            assert done.metrics["weights_bytes"] < first.size_bytes / 2
            assert (await play.conductor.take(Committed, 2)).step == 2
        saved = Shards(checkpoint_dir(tmp_path, 2))
        assert not [name for name in saved if name.startswith("model.")]
        assert (tmp_path / FILE).exists() != folder
        async with Play(tmp_path, config, epoch=1) as play:
            await play.begin(run_attempt=1)
            published = play.conductor.of(WeightsPublished)
            assert [(p.policy_version, p.variant, p.base) for p in published] == [
                (2, "adapter", (1, 0))
            ]
            assert play.directory.base_of(1, 1) == (1, 0), "the older policy of the commit"
            assert not differ(play.directory.load(1, 0), base)
            await play.deliver(make_group(4), make_group(5))
            play.admit(2, 4, 5, last=True)
            await play.conductor.take(Committed)
            assert not differ(play.directory.load(1, 3), newest)
        if folder:
            save_pretrained_folder(build_model(TINY, seed=4)[0], tokenizer, path)
            async with Stage(tmp_path, "trainer", config, devices=("cpu:0",), epoch=2) as stage:
                failed = await stage.heard(Failed)
                assert "put back what [model] path had" in failed.error

    run(main)


def test_samples_are_written(run: Run, tmp_path: Path) -> None:
    """One line a turn for the first groups of a step: what was asked, said, and how likely it was."""

    async def main() -> None:
        async with Play(tmp_path, job_config(metrics={"samples_per_step": 1})) as play:
            await play.begin(run_attempt=3)
            groups = [make_group(0, run_attempt=3), make_group(1, run_attempt=3)]
            await play.deliver(*groups)
            play.admit(0, 1, 0, last=True)
            await play.conductor.take(Committed)
            (line,) = [
                json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()
            ]
            action = make_group(1).segments[0].turns[0].action
            assert (line["step"], line["attempt"]) == (0, 3)
            assert (line["group"], line["sample"], line["turn"]) == (1, 0, 0)
            assert (line["prompt"], line["text"], line["reward"]) == ("ask 1", "text 1.0", 0.0)
            assert line["tokens"] == action.tokens.tolist()
            assert line["prompt_tokens"] == action.prompt.tolist()
            assert line["logprobs"] == [-4.5] * len(action.tokens)

    run(main)


def test_an_update_that_is_no_number_goes_nowhere(run: Run, tmp_path: Path) -> None:
    """It is told, but neither published nor committed, and no further step is taken."""

    async def main() -> None:
        async with Play(tmp_path, job_config(job={"max_staleness": 1})) as play:
            await play.begin()
            await play.deliver(make_group(0, logprobs=np.nan), *(make_group(g) for g in (1, 2, 3)))
            play.admit(0, 0, 1, last=True)
            play.admit(1, 2, 3, last=True)
            metrics = (await play.step_done()).metrics
            assert not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
            await play.stage.until((tmp_path / "samples.jsonl").exists)
            samples = (tmp_path / "samples.jsonl").read_text().splitlines()
            strict = msgspec.json.Decoder()  # refuses a bare NaN
            assert None in strict.decode(samples[0])["logprobs"]
            (late,) = await play.deliver(make_group(4))
            assert late.group == 4
            assert len(play.conductor.of(StepDone)) == 1
            assert len(play.conductor.of(WeightsPublished)) == 1
            assert not play.conductor.of(Committed)
            manifest = newest_manifest(tmp_path)
            assert manifest is not None
            assert manifest.step == 0
            newest = play.directory.newest()
            assert newest is not None
            assert newest.policy_version == 0

    run(main)


def test_commits_when_told_to_and_goes_on_from_there(run: Run, tmp_path: Path) -> None:
    """Not every step commits; the next trainer stands at the last one, with its optimizer."""

    async def main() -> None:
        config = job_config()
        async with Play(tmp_path, config) as play:
            await play.begin()
            await play.deliver(*(make_group(group) for group in range(6)))
            play.admit(0, 0, 1, last=True, commit=False)
            await play.step_done(1)
            play.admit(1, 2, 3, last=True)
            assert (await play.conductor.take(Committed)).step == 2
            play.admit(2, 4, 5, last=True, commit=False)
            await play.step_done(3)
            undisturbed = play.directory.load(0, 3)
            manifest = newest_manifest(tmp_path)
            assert manifest == Manifest(
                step=2, policy_version=2, run_attempt=0, groups=GroupSet.of(range(4))
            )
        async with Play(tmp_path, config, epoch=1) as play:
            ready = await play.conductor.take(TrainerReady)
            assert (ready.epoch, ready.step) == (1, 2)
            published = await play.begin(run_attempt=1)
            assert (published.run_attempt, published.policy_version) == (1, 2)
            await play.deliver(make_group(4), make_group(5))
            play.admit(2, 4, 5, last=True)
            assert (await play.conductor.take(Committed)).run_attempt == 1
            again = play.directory.load(1, 3)
            for name, tensor in undisturbed.items():
                torch.testing.assert_close(again[name], tensor, rtol=0, atol=0)
            manifest = newest_manifest(tmp_path)
            assert manifest is not None
            assert (manifest.step, manifest.groups) == (3, GroupSet.of(range(6)))

    run(main)


def test_a_step_is_committed_once_its_metrics_are_written(run: Run, tmp_path: Path) -> None:
    """A committed step is never taken again, so a conductor that dies before must not cost its line."""

    async def main() -> None:
        async with Play(tmp_path, job_config()) as play:
            play.recording = False
            await play.begin()
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0, 1, last=True)
            await play.step_done()
            await play.deliver(make_group(2))
            assert not play.conductor.of(Committed)
            assert newest_manifest(tmp_path) == Manifest(step=0, policy_version=0, run_attempt=0)
            play.say(StepRecorded(run_attempt=0, step=0))
            assert (await play.conductor.take(Committed)).step == 1

    run(main)


def test_training_goes_on_while_a_commit_is_written(
    run: Run, tmp_path: Path, writers: dict[int, RecordingWriter]
) -> None:
    """One commit is in flight: the step after it is trained, and that one's commit waits. Pausing waits for both."""

    async def main() -> None:
        async with Play(tmp_path, job_config(job={"max_staleness": 1})) as play:
            await play.begin()
            writer = writers[0]
            writer.disk.clear()
            await play.deliver(*(make_group(group) for group in range(6)))
            play.admit(0, 0, 1, last=True)
            play.admit(1, 2, 3, last=True)
            play.admit(2, 4, 5, last=True)
            play.say(CommitAndPause())
            assert (await play.step_done(2)).step == 1
            weights = play.directory.load(0, 1)
            await play.stage.until(lambda: play.stage.actor.time.waits_for == "commit")
            assert writer.calls == [0, "write", "commit", 1]
            assert not play.conductor.of(Committed)
            assert newest_manifest(tmp_path) == Manifest(step=0, policy_version=0, run_attempt=0)
            writer.disk.set()
            assert (await play.conductor.take(Committed)).step == 1
            assert len(play.conductor.of(Committed)) == 1
            # What counts now is step 1 as it was, though step 2 was trained before it was written.
            saved = Shards(checkpoint_dir(tmp_path, 1))
            for name, tensor in weights.items():
                assert torch.equal(saved[f"model.{name}"], tensor)
            last = await play.conductor.take(Committed, 3)
            assert last.step == 3
            assert last.seconds > 0
            assert [m.step for m in play.conductor.of(Committed)] == [1, 2, 3]
            assert (await play.conductor.take(Paused)).step == 3

    run(main)


@pytest.mark.parametrize("admitted", [0, 1])
def test_commits_and_pauses(run: Run, tmp_path: Path, admitted: int) -> None:
    """At a boundary or with a step begun: it commits what is whole, and trains nothing more."""

    async def main() -> None:
        async with Play(tmp_path, job_config()) as play:
            await play.begin()
            await play.deliver(*(make_group(group) for group in range(4)))
            play.admit(0, 0, 1, last=True, commit=False)
            await play.step_done()
            play.admit(1, *range(2, 2 + admitted))
            play.say(CommitAndPause())
            assert (await play.conductor.take(Paused)).step == 1
            assert [m.step for m in play.conductor.of(Committed)] == [1]
            play.admit(1, *range(2 + admitted, 4), last=True)
            play.say(CommitAndPause())
            assert (await play.conductor.take(Paused, 2)).step == 1
            assert len(play.conductor.of(StepDone)) == 1
            manifest = newest_manifest(tmp_path)
            assert manifest is not None
            assert (manifest.step, manifest.groups) == (1, GroupSet.of({0, 1}))

    run(main)


def test_dropped_and_doubled_groups(run: Run, tmp_path: Path) -> None:
    """A second delivery is acknowledged and forgotten; what is dropped leaves nothing behind."""

    async def main() -> None:
        async with Play(tmp_path, job_config()) as play:
            await play.begin()
            await play.deliver(make_group(0))
            await play.groups.call(make_group(0))
            await play.deliver(make_group(1))
            assert [r.group for r in play.conductor.of(GroupReceived)] == [0, 1]
            play.say(Drop(group=1, attempt=0))
            play.say(Drop(group=9, attempt=0))
            await play.stage.until(lambda: list(play.stage.actor.pool) == [(0, 0)])

    run(main)


def test_a_rollback_forgets_what_was_admitted(run: Run, tmp_path: Path) -> None:
    """A new BeginRun, in the middle of a step: nothing of before is trained."""

    async def main() -> None:
        config = job_config(trainer={"micro_batch_tokens": 1})
        async with Play(tmp_path, config) as play:
            await play.begin()
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0)
            await play.begin(run_attempt=1)
            await play.deliver(make_group(2), make_group(3))
            assert set(play.stage.actor.pool) == {(2, 0), (3, 0)}
            play.admit(0, 2, 3, last=True)
            done = await play.step_done()
            assert done.run_attempt == 1
            expected = trained_by_hand(config, play.stage, [[2, 3]])
            for name, tensor in play.directory.load(1, 1).items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)

    run(main)


def test_taking_turns_it_waits_for_the_whole_batch(run: Run, tmp_path: Path) -> None:
    """Under a shared lease the device is wanted once the step is complete, and idle after it."""

    async def main() -> None:
        config = job_config(trainer={"micro_batch_tokens": 1})
        async with Play(tmp_path, config, shared=True) as play:
            await play.begin()
            await play.stage.heard(LeaseIdle, 2)  # after set-up, and after publishing
            play.stage.granting = False
            released = await play.stage.revoke(offload=True)
            assert released.memory_bytes == 0
            wanted = len(play.stage.of(LeaseWanted))
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0)
            await play.deliver(make_group(2))
            assert len(play.stage.of(LeaseWanted)) == wanted
            play.admit(0, 1, last=True)
            await play.stage.heard(LeaseWanted, wanted + 1)
            assert not play.conductor.of(StepDone)
            idle = len(play.stage.of(LeaseIdle))
            play.stage.grant()
            await play.step_done()
            assert_weights(play.directory, 1, trained_by_hand(config, play.stage, [[0, 1]]))
            await play.stage.heard(LeaseIdle, idle + 1)

    run(main)


def test_gradients_that_an_offload_forgets_are_made_again(run: Run, tmp_path: Path) -> None:
    """Offloaded in the middle of a streamed step, the step's groups are gone through again."""

    async def main() -> None:
        config = job_config(job={"groups_per_step": 3}, trainer={"micro_batch_tokens": 1})
        async with Play(tmp_path, config) as play:
            await play.begin()
            await play.deliver(*(make_group(group) for group in range(3)))
            play.admit(0, 0, 1)
            await play.stage.until(lambda: play.stage.actor.accumulated)
            await play.stage.until(lambda: not play.stage.actor.admitted[0])
            await play.deliver(make_group(9))  # both chunks are through
            await play.stage.revoke(offload=True)
            play.admit(0, 2, last=True)
            await play.step_done()
            assert_weights(play.directory, 1, trained_by_hand(config, play.stage, [[0, 1, 2]]))

    run(main)


def test_more_memory_than_the_lease_allows_is_an_error(run: Run, tmp_path: Path) -> None:
    """The trainer says how much it holds and how much it may."""

    async def main() -> None:
        async with Play(tmp_path, job_config(), device_memory_bytes=2**12) as play:
            await play.begin()
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0, 1, last=True)
            assert play.stage.life is not None
            assert await play.stage.life == 1
            assert "DeviceMemoryExceeded" in play.stage.of(Failed)[0].error

    run(main)


def test_a_damaged_commit_is_named(run: Run, tmp_path: Path) -> None:
    """A manifest without its weights: which file, and the way out."""

    async def main() -> None:
        (tmp_path / "checkpoints").mkdir()
        write_manifest(tmp_path, Manifest(step=3, policy_version=3, run_attempt=0))
        async with Stage(tmp_path, "trainer", job_config(), devices=("cpu:0",)) as stage:
            assert stage.life is not None
            assert await stage.life == 1
            (failed,) = stage.of(Failed)
            assert failed.during_setup
            assert "BadCheckpoint" in failed.error
            assert "step-00000003" in failed.error
            assert "go on from the commit before" in failed.error

    run(main)


class FakeEngine:
    """Stands for a rank's engine where the test is about what ranks are told."""

    def __init__(self, rank: int) -> None:
        self.calls: list[Any] = []
        self.rank = rank

    def begin_step(self) -> None:
        self.calls.append("begin_step")

    def accumulate(self, groups: Sequence[Group]) -> None:
        self.calls.append([group.group for group in groups])

    def finish_step(self) -> dict[str, float]:
        self.calls.append("finish_step")
        return {"loss": 0.0, "grad_norm": 1.0}

    def weights(self) -> Any:
        # Really those of all ranks are equal; here it is to be seen who wrote what.
        return iter([(f"w.{i}", torch.full((3,), float(self.rank))) for i in range(4)])

    def state(self) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(1)}

    def load_state(self, state: Any) -> None:
        self.calls.append("load_state")

    def offload(self) -> None:
        self.calls.append("offload")

    def onload(self) -> None:
        self.calls.append("onload")

    def memory_bytes(self) -> int:
        return 4


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[int, FakeEngine]:
    """The engine of each rank."""
    made: dict[int, FakeEngine] = {}

    def build(spec: Any, config: JobConfig) -> FakeEngine:
        return made.setdefault(spec.rank, FakeEngine(spec.rank))

    monkeypatch.setattr(building, "build_engine", build)
    return made


def test_ranks_share_a_step(
    run: Run,
    tmp_path: Path,
    engines: dict[int, FakeEngine],
    writers: dict[int, RecordingWriter],
) -> None:
    """The leader gives each rank groups by tokens, has all of them update and commit, and parks them with itself."""

    async def main() -> None:
        config = job_config(job={"groups_per_step": 4}, trainer={"devices": 2})
        hub = InlineHub()
        devices = {
            "num_ranks": 2,
            "replica_devices": ("cpu:0", "cpu:1"),
            "hub": hub,
            "shared": True,
        }
        async with Play(tmp_path, config, devices=("cpu:0",), **devices) as play:
            # The conductor is quick: it begins the run before the leader knows the other rank.
            play.say(BeginRun(run_attempt=0, step=0))
            follower = Stage(
                tmp_path,
                "trainer",
                config,
                actor="trainer-0.1",
                rank=1,
                devices=("cpu:1",),
                **devices,
            )
            async with follower:
                await follower.heard(Ready)
                assert not play.conductor.of(WeightsPublished)
                for one, other in ((play.stage, follower), (follower, play.stage)):
                    one.tell(other.introduction)
                await play.conductor.take(WeightsPublished)
                assert engines[1].calls == ["load_state"]
                written = play.directory.load(0, 0)
                assert sorted(float(w.mean()) for w in written.values()) == [0.0, 0.0, 1.0, 1.0]
                groups = [make_group(group) for group in range(4)]
                await play.deliver(*groups)
                play.admit(0, 0, 1, 2, 3, last=True)
                await play.step_done()
                own, others = engines[0].calls[1:], engines[1].calls[1:]
                assert [own[0], own[2]] == [others[0], others[2]] == ["begin_step", "finish_step"]
                assert sorted(own[1] + others[1]) == [0, 1, 2, 3]
                assert own[1][0] == 0
                assert others[1]
                assert own[1] == sorted(own[1])
                # flowd revokes both; the follower goes on until its leader parks.
                follower_released = asyncio.create_task(follower.revoke(offload=True))
                for _ in range(10):
                    await asyncio.sleep(0)
                assert not follower_released.done()
                await play.stage.revoke(offload=True)
                await follower_released
                assert engines[0].calls[-1] == engines[1].calls[-1] == "offload"
                await play.deliver(*(make_group(group) for group in range(4, 8)))
                play.admit(1, 4, 5, 6, 7, last=True)
                await play.step_done(2)
                assert "onload" in engines[1].calls
                await play.conductor.take(Committed, 2)
                whole = ["write", "commit"]
                assert writers[0].calls == [0, *whole, 1, *whole, 2, *whole]
                assert writers[1].calls == [1, "write", 2, "write"]
                assert f"{JOB}/trainer-0.1" == follower.spec.peer

    run(main)


READ_OUTSIDE: dict[str, Any] = {
    "algorithm": {"name": "decoupled_ppo", "mini_batches": 2},
    "inference": {"devices": 1, "computes": ["proximal", "values"]},
}


class Reader:
    """An inference actor that says of every token what the test tells it to."""

    def __init__(self, peer: Peer, trainer: str) -> None:
        self.requests = peer.router.consumer("readings", capacity=8)
        self.requests.add_producer(trainer)
        self.told: list[tuple[int, int, int]] = []  # group, run attempt, version

    async def answer(self) -> None:
        item = await self.requests.get()
        request = item.payload
        self.told.append((request.group.group, request.run_attempt, request.version))
        item.ack(
            tuple(
                PolicyReading(
                    version=request.version,
                    proximal=np.full(segment.num_tokens, -4.0, dtype=np.float32),
                    values=np.full(segment.num_tokens, 0.5, dtype=np.float32),
                )
                for segment in request.group.segments
            )
        )


async def reader_of(play: Play, name: str) -> Reader:
    return Reader(await play.stage.meet(name, "inference"), play.stage.spec.peer)


@pytest.mark.parametrize("micro_batch_tokens", [16384, 1])
def test_inference_actors_are_asked_about_admitted_groups(
    run: Run, tmp_path: Path, micro_batch_tokens: int
) -> None:
    """With the version that the step begins with, policy and critic of which are on the host by then; about all that
    are admitted at once, also where they are computed on one by one. The step is trained on the answers."""

    async def main() -> None:
        config = job_config(trainer={"micro_batch_tokens": micro_batch_tokens}, **READ_OUTSIDE)
        async with Play(tmp_path, config) as play:
            reader = await reader_of(play, "inference-0")
            critics = WeightsDirectory(tmp_path / "weights" / CRITIC_WEIGHTS)
            await play.begin()
            await play.deliver(*(make_group(group) for group in range(4)))
            play.admit(1, 2, 3, last=True)  # for the next step: not before its version is out
            play.admit(0, 0, 1, last=True)
            await play.stage.until(lambda: reader.requests.statistics().depth == 2)
            await reader.answer()
            assert not play.conductor.of(StepDone)
            await reader.answer()
            assert (await play.step_done()).step == 0
            await reader.answer()
            play.admit(1, 2)  # said again, as conductors of deterministic jobs do
            await reader.answer()
            done = await play.step_done(2)
            assert reader.told == [(0, 0, 0), (1, 0, 0), (2, 0, 1), (3, 0, 1)]
            assert not torch.equal(*(critics.load(0, v)["head.weight"] for v in (1, 2)))
            # The behaviour policy's are -4.5: its weights are those of the proximal policy that was told.
            assert done.metrics["correction_mean"] == pytest.approx(np.exp(0.5), rel=1e-5)

    run(main)


def test_what_a_dead_inference_actor_was_asked_goes_to_the_next(run: Run, tmp_path: Path) -> None:
    """The trainer has the group; nothing is played again."""

    async def main() -> None:
        async with Play(tmp_path, job_config(**READ_OUTSIDE)) as play:
            first = await reader_of(play, "inference-0")
            await play.begin()
            await play.deliver(make_group(0), make_group(1))
            play.admit(0, 0, 1, last=True)
            await first.requests.get()
            play.stage.lose("inference-0")
            second = await reader_of(play, "inference-1")
            for _ in range(2):
                await second.answer()
            await play.step_done()
            assert sorted(second.told) == [(0, 0, 0), (1, 0, 0)]

    run(main)


def test_a_step_that_is_not_trained_withdraws_what_it_asked(run: Run, tmp_path: Path) -> None:
    """The job goes back while a step waits for groups; the next attempt asks anew, by its own version."""

    async def main() -> None:
        async with Play(tmp_path, job_config(**READ_OUTSIDE)) as play:
            reader = await reader_of(play, "inference-0")
            await play.begin()
            await play.deliver(make_group(0))
            play.admit(0, 0)
            asked = await reader.requests.get()
            await play.begin(run_attempt=1)
            await asked.wait_cancelled()
            asked.ack()
            play.admitted.clear()
            await play.deliver(*(make_group(group, run_attempt=1) for group in range(2)))
            play.admit(0, 0, 1, last=True)
            for _ in range(2):
                await reader.answer()
            await play.step_done()
            assert reader.told == [(0, 1, 0), (1, 1, 0)]

    run(main)
