"""What inference actors compute is what the trainer computes itself: the same reference log-probs, the same step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from trainer_cases import (
    TRAINER,
    difference,
    engine,
    make_groups,
    parameters,
    qwen,
    step,
    whole,
)

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends.hf_inference import HFInferenceEngine
from actors.backends.hf_trainer import HFTrainingEngine
from actors.backends.reference_file import load_reference, save_reference
from actors.episodes import Group
from actors.errors import BadCheckpoint
from actors.trainer.config import TrainerConfig

KL: dict[str, Any] = {"kl_coefficient": 0.5, "kl_place": "loss"}


def reference_of(model: Any) -> HFInferenceEngine:
    return HFInferenceEngine(reference=model, config=TRAINER, device="cpu")


def without_reference(model: Any, settings: dict[str, Any]) -> HFTrainingEngine:
    return HFTrainingEngine(
        model,
        algorithm=registry.find("grpo"),
        algorithm_config=AlgorithmConfig(**settings),
        config=TRAINER,
        given=["reference"],
    )


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_steps_are_those_of_a_trainer_with_its_own_reference(place: str) -> None:
    """Two steps: in the second the policy has left the reference. Several turns, masks, other micro-batches."""
    settings = {**KL, "kl_place": place}
    alone, fed = engine(qwen(), **settings), without_reference(qwen(), settings)
    reference = reference_of(qwen())
    for _ in range(2):
        groups = make_groups()
        own = step(alone, groups)
        given = step(fed, *[[reference.read_reference(group)] for group in groups])
        assert given["kl_reference"] == pytest.approx(own["kl_reference"], abs=1e-6)
        assert given["loss"] == pytest.approx(own["loss"], abs=1e-6)
    assert own["kl_reference"] > 0
    assert difference(parameters(alone), parameters(fed)) < 1e-6
    assert "reference.model.norm.weight" in alone.state()
    assert not [name for name in fed.state() if name.startswith("reference.")]


def test_a_group_keeps_all_else_that_it_had() -> None:
    """One log-prob a token, 0 where none is trained; also where a whole segment is not trained."""
    group = make_groups(1)[0]
    first = group.segments[0]
    untrained = replace(
        first,
        turns=tuple(
            replace(t, action=replace(t.action, mask=np.zeros_like(t.action.mask)))
            for t in first.turns
        ),
    )
    group = replace(group, segments=(untrained, *group.segments[1:]))
    read = reference_of(qwen()).read_reference(group)
    for before, after in zip(group.segments, read.segments, strict=True):
        for turn, told in zip(before.turns, after.turns, strict=True):
            logprobs = told.computed["reference"]
            assert logprobs.dtype == np.float32
            assert ((logprobs < 0) == turn.action.mask).all()
            assert replace(told, computed={}) == turn


def test_numbers_do_not_depend_on_what_else_was_read() -> None:
    """Bit for bit: groups are read one by one."""
    groups, reference = make_groups(), reference_of(qwen(torch.float32))
    one = [reference.read_reference(group) for group in groups]
    again = [reference.read_reference(group) for group in reversed(groups)][::-1]
    for left, right in zip(one, again, strict=True):
        assert told(left) == told(right)


def told(group: Group) -> list[list[float]]:
    return [turn.computed["reference"].tolist() for s in group.segments for turn in s.turns]


def test_a_trainer_without_a_reference_refuses_groups_that_bring_none() -> None:
    """The KL would be left out without a word."""
    fed = without_reference(qwen(), KL)
    fed.begin_step()
    with pytest.raises(AssertionError, match="no inference actor"):
        fed.accumulate(make_groups())


def test_the_reference_goes_by_way_of_a_file(tmp_path: Path) -> None:
    """The policy alone, without the critic that is trained beside it; another model, or none, is told."""
    trainer = engine(qwen(torch.float32), name="ppo", critic="model")
    save_reference(tmp_path, dict(trainer.weights()))
    step(trainer, make_groups())
    model = qwen(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_reference(tmp_path, model)
    group = make_groups()[0]
    assert told(reference_of(model).read_reference(group)) == told(
        reference_of(qwen(torch.float32)).read_reference(group)
    )
    with pytest.raises(BadCheckpoint, match="not the reference policy"):
        load_reference(tmp_path, qwen(hidden_size=32))
    with pytest.raises(BadCheckpoint, match="submit the job anew"):
        load_reference(tmp_path / "elsewhere", model)


def test_memory_is_that_of_the_weights_and_none_when_offloaded() -> None:
    """It reads the same when it is back."""
    model = qwen(torch.float32)
    reference = reference_of(model)
    assert reference.memory_bytes() == sum(p.nbytes for p in model.parameters())
    group = make_groups(1)[0]
    before = told(reference.read_reference(group))
    reference.offload()
    assert reference.memory_bytes() == 0
    reference.onload()
    assert told(reference.read_reference(group)) == before


def reader_of(critic: str | None, config: TrainerConfig = TRAINER) -> HFInferenceEngine:
    """Of other weights than any version's, until one is loaded."""
    model = qwen(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return HFInferenceEngine(
        policy=model, critic=critic, proximal=True, config=config, device="cpu"
    )


def actor_critic(critic: str, given: tuple[str, ...] = (), **changes: Any) -> HFTrainingEngine:
    return HFTrainingEngine(
        qwen(torch.float32),
        algorithm=registry.find("decoupled_ppo"),
        algorithm_config=AlgorithmConfig(
            name="decoupled_ppo",
            critic=critic,
            epochs=2,
            mini_batches=2,
            gae_lambda=0.9,
            mask_level="token",
        ),
        config=msgspec.structs.replace(TRAINER, **changes),
        given=given,
    )


def load(reader: HFInferenceEngine, trainer: HFTrainingEngine, version: int) -> None:
    weights, critic = dict(trainer.weights()), dict(trainer.critic_weights())
    reader.load_policy(
        version, {n: whole(t) for n, t in weights.items()}, {n: whole(t) for n, t in critic.items()}
    )


def with_readings(reader: HFInferenceEngine, group: Group) -> Group:
    read = zip(group.segments, reader.read_policy(group), strict=True)
    return replace(group, segments=tuple(replace(s, reading=reading) for s, reading in read))


def cut_off(groups: list[Group]) -> list[Group]:
    """Episodes that did not end: their advantages need the value after the last token."""
    return [
        replace(group, segments=tuple(replace(s, terminated=False) for s in group.segments))
        for group in groups
    ]


@pytest.mark.parametrize("critic", ["head", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_those_of_a_trainer_that_reads_its_own_policy(critic: str, dtype: str) -> None:
    """Three steps of four updates: proximal log-probs and values of the version that each begins with, in the
    trainer's precision; half of the episodes go on after they were cut."""
    alone = actor_critic(critic, dtype=dtype)
    fed = actor_critic(critic, ("proximal", "values"), dtype=dtype)
    reader = reader_of(critic, msgspec.structs.replace(TRAINER, dtype=dtype))
    groups = make_groups()
    groups = [*groups[:2], *cut_off(groups[2:])]
    # Numbers of bfloat16 depend on what else is in a micro-batch, by a digit of theirs.
    near = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    for version in range(3):
        load(reader, fed, version)
        own = step(alone, *[[group] for group in groups])
        given = step(fed, *[[with_readings(reader, group)] for group in groups])
        assert given == pytest.approx(own, rel=near, abs=near)
    assert own["value_loss"] > 0
    assert difference(parameters(alone), parameters(fed)) < near
    assert difference(parameters(alone), dict(qwen(torch.float32).named_parameters())) > near


def test_readings_of_another_version_are_refused() -> None:
    """As are groups without: the step would be another one, without a word."""
    trainer = actor_critic("head", ("proximal", "values"))
    reader = reader_of("head")
    load(reader, trainer, 3)
    (group,) = make_groups(1)
    trainer.begin_step()
    with pytest.raises(AssertionError, match="read by version 3 for the step of version 0"):
        trainer.accumulate([with_readings(reader, group)])
    with pytest.raises(AssertionError, match="no inference actor gave"):
        trainer.accumulate([group])


def test_a_segment_without_trained_tokens_has_an_empty_reading() -> None:
    """One reading a segment, in their order, one number a trained token."""
    trainer, reader = actor_critic("head"), reader_of("head")
    load(reader, trainer, 0)
    (group,) = make_groups(1)
    first = group.segments[0]
    masked = tuple(
        replace(t, action=replace(t.action, mask=np.zeros_like(t.action.mask))) for t in first.turns
    )
    group = replace(group, segments=(*group.segments[1:], replace(first, turns=masked)))
    readings = reader.read_policy(group)
    for segment, reading in zip(group.segments, readings, strict=True):
        trained = sum(int(turn.action.mask.sum()) for turn in segment.turns)
        assert reading.version == 0
        assert reading.proximal is not None
        assert reading.values is not None
        assert len(reading.proximal) == len(reading.values) == trained
    assert len(readings[-1].values) == 0


def test_weights_of_another_model_are_refused() -> None:
    """And what is left then is not read."""
    reader = reader_of("head")
    other = engine(qwen(torch.float32, hidden_size=32), name="ppo")
    with pytest.raises(ValueError, match="weights do not fit"):
        load(reader, other, 1)
    with pytest.raises(AssertionError, match="no weights were loaded"):
        reader.read_policy(make_groups(1)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_offloads_and_comes_back() -> None:
    """The memory is really given up, and the numbers are the same afterwards; near those of the CPU."""
    model = qwen(torch.float32, hidden_size=512, intermediate_size=2048, head_dim=256)
    group = make_groups(1)[0]
    on_cpu = told(reference_of(model).read_reference(group))
    reference = HFInferenceEngine(reference=model, config=TRAINER, device="cuda")
    before, held = told(reference.read_reference(group)), torch.cuda.memory_allocated()
    reference.offload()
    assert torch.cuda.memory_allocated() <= held - sum(p.nbytes for p in model.parameters())
    reference.onload()
    assert told(reference.read_reference(group)) == before
    for cpu, gpu in zip(on_cpu, before, strict=True):
        assert gpu == pytest.approx(cpu, abs=1e-2)
