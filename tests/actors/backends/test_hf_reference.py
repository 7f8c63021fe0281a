"""What inference actors compute is what the trainer computes itself: the same reference log-probs, the same step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import TRAINER, difference, engine, make_groups, parameters, qwen, step

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends.contract import policy_of
from actors.backends.hf_reference import HFReferenceEngine
from actors.backends.hf_trainer import HFTrainingEngine
from actors.backends.reference_file import load_reference, save_reference
from actors.episodes import Group
from actors.errors import BadCheckpoint

KL: dict[str, Any] = {"kl_coefficient": 0.5, "kl_place": "loss"}


def reference_of(model: Any) -> HFReferenceEngine:
    return HFReferenceEngine(model, config=TRAINER, device="cpu")


def without_reference(model: Any, settings: dict[str, Any]) -> HFTrainingEngine:
    return HFTrainingEngine(
        model,
        algorithm=registry.find("grpo"),
        algorithm_config=AlgorithmConfig(**settings),
        config=TRAINER,
        keep_reference=False,
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
        given = step(fed, *[[reference.read(group)] for group in groups])
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
    read = reference_of(qwen()).read(group)
    for before, after in zip(group.segments, read.segments, strict=True):
        for turn, told in zip(before.turns, after.turns, strict=True):
            logprobs = told.computed["reference"]
            assert logprobs.dtype == np.float32
            assert ((logprobs < 0) == turn.action.mask).all()
            assert replace(told, computed={}) == turn


def test_numbers_do_not_depend_on_what_else_was_read() -> None:
    """Bit for bit: groups are read one by one."""
    groups, reference = make_groups(), reference_of(qwen(torch.float32))
    one = [reference.read(group) for group in groups]
    again = [reference.read(group) for group in reversed(groups)][::-1]
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
    save_reference(tmp_path, policy_of(trainer.state()))
    step(trainer, make_groups())
    model = qwen(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_reference(tmp_path, model)
    group = make_groups()[0]
    assert told(reference_of(model).read(group)) == told(
        reference_of(qwen(torch.float32)).read(group)
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
    before = told(reference.read(group))
    reference.offload()
    assert reference.memory_bytes() == 0
    reference.onload()
    assert told(reference.read(group)) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_offloads_and_comes_back() -> None:
    """The memory is really given up, and the numbers are the same afterwards; near those of the CPU."""
    model = qwen(torch.float32, hidden_size=512, intermediate_size=2048, head_dim=256)
    group = make_groups(1)[0]
    on_cpu = told(reference_of(model).read(group))
    reference = HFReferenceEngine(model, config=TRAINER, device="cuda")
    before, held = told(reference.read(group)), torch.cuda.memory_allocated()
    reference.offload()
    assert torch.cuda.memory_allocated() <= held - sum(p.nbytes for p in model.parameters())
    reference.onload()
    assert told(reference.read(group)) == before
    for cpu, gpu in zip(on_cpu, before, strict=True):
        assert gpu == pytest.approx(cpu, abs=1e-2)
