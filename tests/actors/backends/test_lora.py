"""An adapter is trained, the model stays, and what is published is the two merged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from trainer_cases import TRAINER, difference, engine, make_groups, parameters, qwen, step, whole

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends.hf_trainer import HFTrainingEngine
from actors.models.config import LoraConfig
from actors.trainer.config import TrainerConfig

peft = pytest.importorskip("peft", reason="needs the extra `lora`")
LORA = LoraConfig(rank=2, alpha=8)


def adapted(
    model: Any,
    config: TrainerConfig = TRAINER,
    group: Any = None,
    lora: LoraConfig = LORA,
    **settings: Any,
) -> HFTrainingEngine:
    return HFTrainingEngine(
        model,
        algorithm=registry.find("grpo"),
        algorithm_config=AlgorithmConfig(**settings),
        config=config,
        process_group=group,
        lora=lora,
        seed=3,
    )


def test_what_is_published_is_what_peft_merges():
    """Under the model's own names, in its own order, after two steps."""
    trainer = adapted(qwen())
    before = parameters(engine(qwen()))
    for _ in range(2):
        step(trainer, make_groups())
    published = parameters(trainer)
    assert list(published) == list(before)
    merged = copy.deepcopy(trainer.model)
    for module in merged.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    expected = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in merged.named_parameters()
        if "lora_" not in name
    }
    assert difference(published, expected) < 1e-12
    changed = {name for name in before if not torch.equal(before[name], published[name])}
    assert changed == {name for name in before if "proj.weight" in name}


def test_only_the_adapter_is_trained_and_saved_beside_the_model():
    """Gradients, moments and the optimizer's memory are the adapter's; a restored run goes on the same."""
    trainer = adapted(qwen())
    groups = make_groups()
    trainer.begin_step()
    trainer.accumulate(groups)
    trained = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    trainer.finish_step()
    saved = {name: tensor.clone() for name, tensor in trainer.state().items()}
    moments = [name for name in saved if name.startswith("exp_avg.")]
    assert moments
    assert all(name.startswith("exp_avg.adapter.") for name in moments)
    restored = adapted(qwen())
    restored.load_state(saved)
    assert step(restored, groups) == step(trainer, groups)
    assert difference(parameters(restored), parameters(trainer)) == 0


def test_it_begins_as_the_model_of_a_state_without_an_adapter():
    """Commit 0 is written before there is one: warmed-up weights, and an adapter that changes nothing yet."""
    warm = engine(qwen())
    step(warm, make_groups())
    state = {name: tensor for name, tensor in warm.state().items() if name.startswith("model.")}
    state |= {"steps": torch.tensor(0), "updates": torch.tensor(0)}
    trainer = adapted(qwen())
    trainer.load_state(state)
    assert difference(parameters(trainer), parameters(warm)) == 0
    with pytest.raises(ValueError, match="adapter"):
        trainer.load_state({**state, "steps": torch.tensor(1)})


def test_the_reference_is_the_model_without_the_adapter():
    """No second model: KL is zero before the first update and that of a copy of the model after it."""
    groups = make_groups()
    trainer = adapted(qwen(), kl_coefficient=0.1)
    first, second = step(trainer, groups), step(trainer, groups)
    assert first["kl_reference"] == 0
    assert second["kl_reference"] > 0
    assert not [name for name in trainer.state() if name.startswith("reference.")]


def test_target_modules_choose_the_layers():
    """By the last part of the name; one that no layer has is refused."""
    trainer = adapted(qwen(), lora=LoraConfig(rank=2, target_modules=("q_proj", "v_proj")))
    step(trainer, make_groups())
    names = {name.split(".")[-2] for name in trainer.state() if name.startswith("adapter.")}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="nowhere"):
        step(adapted(qwen(), lora=LoraConfig(target_modules=("nowhere",))), make_groups())


def test_in_bfloat16_the_adapter_stays_float32():
    """And the frozen weights do not: they need no master."""
    trainer = adapted(qwen(torch.float32), TrainerConfig(learning_rate=1e-2, dtype="bfloat16"))
    exact = adapted(qwen(torch.float32), TrainerConfig(learning_rate=1e-2))
    groups = make_groups()
    step(trainer, groups)
    step(exact, groups)
    assert step(trainer, groups)["loss"] == pytest.approx(step(exact, groups)["loss"], abs=0.02)
    dtypes = {name.partition(".")[0]: tensor.dtype for name, tensor in trainer.state().items()}
    assert dtypes["adapter"] == dtypes["exp_avg"] == torch.float32
    assert dtypes["base"] == dtypes["model"] == torch.bfloat16


def _rank(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    groups = make_groups()
    trainer = adapted(qwen(), group=dist.group.WORLD, kl_coefficient=0.1)
    first = step(trainer, groups[:1] if rank == 0 else groups[1:])
    second = step(trainer, *([groups] if rank == 0 else []))
    state = {name: whole(tensor).clone() for name, tensor in trainer.state().items()}
    torch.save((first, second, state), f"{results}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_train_the_adapter_that_one_trains(tmp_path: Path):
    """The model in shards, the adapter whole on both; merged shard by shard."""
    alone = adapted(qwen(), kl_coefficient=0.1)
    expected = [step(alone, make_groups()), step(alone, make_groups())]
    run_ranks(2, _rank, str(tmp_path / "store"), str(tmp_path))
    for rank in range(2):
        first, second, state = torch.load(tmp_path / str(rank))
        assert [first, second] == [pytest.approx(metrics, rel=1e-6) for metrics in expected]
        for name, tensor in alone.state().items():
            assert (state[name] - tensor).abs().max() < 1e-9, name
