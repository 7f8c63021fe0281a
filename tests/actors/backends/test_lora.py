"""An adapter is trained and published, the model stays, and a sampler with both is the policy that is trained."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch import Tensor
from trainer_cases import TRAINER, difference, engine, make_groups, parameters, qwen, step, whole

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends.contract import GenerationRequest
from actors.backends.hf_engine import HFGenerationEngine
from actors.backends.hf_inference import HFInferenceEngine
from actors.backends.hf_trainer import HFTrainingEngine
from actors.backends.lora import LoraAdapter, merge
from actors.errors import BadCheckpoint
from actors.models.config import LoraConfig
from actors.trainer.config import TrainerConfig

peft = pytest.importorskip("peft", reason="needs the extra `lora`")
LORA = LoraConfig(rank=2, alpha=8)


def adapted(
    model: Any,
    config: TrainerConfig = TRAINER,
    group: Any = None,
    lora: LoraConfig = LORA,
    name: str = "grpo",
    **settings: Any,
) -> HFTrainingEngine:
    return HFTrainingEngine(
        model,
        algorithm=registry.find(name),
        algorithm_config=AlgorithmConfig(name=name, **settings),
        config=config,
        process_group=group,
        lora=lora,
        seed=3,
    )


def test_what_is_merged_is_what_peft_merges():
    """Under the model's own names, in its own order, after two steps."""
    trainer = adapted(qwen())
    before = parameters(engine(qwen()))
    for _ in range(2):
        step(trainer, make_groups())
    ours = dict(merge(parameters(trainer), trainer.adapter(), LORA.scale))
    assert list(ours) == list(before)
    merged = copy.deepcopy(trainer.model)
    for module in merged.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    expected = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in merged.named_parameters()
        if "lora_" not in name
    }
    assert difference(ours, expected) < 1e-12
    changed = {name for name in before if not torch.equal(before[name], ours[name])}
    assert changed == {name for name in before if "proj.weight" in name}


def test_only_the_adapter_is_trained_published_and_saved():
    """Gradients, moments and the optimizer's memory are the adapter's; a restored run goes on the same."""
    trainer = adapted(qwen())
    groups = make_groups()
    trainer.begin_step()
    trainer.accumulate(groups)
    trained = {name for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in trainer.model.named_parameters() if "lora_" in name}
    trainer.finish_step()
    assert difference(parameters(trainer), parameters(engine(qwen()))) == 0, "the base is published"
    saved = {name: tensor.clone() for name, tensor in trainer.state().items()}
    kinds = {name.partition(".")[0] for name in saved}
    assert kinds == {"adapter", "exp_avg", "exp_avg_sq", "steps", "updates", "base"}
    assert {f"adapter.{name}" for name in trainer.adapter()} == {
        n for n in saved if n[:8] == "adapter."
    }
    restored = adapted(qwen())
    restored.load_state(saved)
    assert step(restored, groups) == step(trainer, groups)
    assert difference(restored.adapter(), trainer.adapter()) == 0


def test_an_adapter_is_refused_by_another_model_unless_its_own_comes_along():
    """A model that was trained before it got an adapter comes with the state; one from a folder has to be the same."""
    warm = qwen()
    step(engine(warm), make_groups())
    trainer = adapted(copy.deepcopy(warm))
    step(trainer, make_groups())
    state = {name: tensor.clone() for name, tensor in trainer.state().items()}
    other = adapted(qwen())
    with pytest.raises(BadCheckpoint, match="not the one that the adapter was trained on"):
        other.load_state(state)
    base = {f"model.{name}": tensor for name, tensor in parameters(engine(warm)).items()}
    other.load_state({**state, **base})
    assert step(other, make_groups()) == step(trainer, make_groups())
    other.load_state(state)  # by now it has it
    del state[f"adapter.{next(iter(trainer.adapter()))}"]
    with pytest.raises(ValueError, match=r"adapter\..* missing"):
        other.load_state(state)


def sampler_of(weights: Any, dtype: torch.dtype) -> HFGenerationEngine:
    """A sampler with weights of version 0."""
    made = HFGenerationEngine(
        qwen(torch.float32), max_running=4, max_context_tokens=32, pad_token=0, dtype=dtype
    )
    made.load_weights(0, weights)
    return made


def sample(sampler: HFGenerationEngine) -> Any:
    """Tokens and log-probs of one sequence."""
    prompt = np.arange(3, 9, dtype=np.int32)
    sampler.add(GenerationRequest(request_id=1, context=prompt, max_new_tokens=12, key=5))
    while True:
        ended = sampler.step()
        if ended:
            return ended[0]


def test_a_sampler_puts_adapters_on_top_of_what_it_has():
    """As merged weights would have it; the next one takes its place, and whole weights take it off."""
    trainer = adapted(qwen(torch.float32))
    base = parameters(trainer)
    sampler = sampler_of(base, torch.float32)
    bare, held = sample(sampler), sampler.memory_bytes()
    for version in (1, 2):
        step(trainer, make_groups())
        sampler.load_adapter(version, trainer.adapter(), LORA.scale)
        merged = dict(merge(base, trainer.adapter(), LORA.scale))
        found, expected = sample(sampler), sample(sampler_of(merged, torch.float32))
        assert found.tokens.tolist() == expected.tokens.tolist()
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
        assert not np.allclose(found.logprobs, bare.logprobs[: len(found.logprobs)], atol=1e-3)
        assert set(found.versions) == {version}
    adapter_bytes = sum(tensor.nbytes for tensor in trainer.adapter().values())
    assert sampler.memory_bytes() == held + adapter_bytes
    sampler.offload()
    sampler.onload()
    assert sample(sampler).logprobs.tolist() == found.logprobs.tolist()
    sampler.load_weights(3, base)
    assert sample(sampler).logprobs.tolist() == bare.logprobs.tolist()


def test_in_bfloat16_the_sampler_with_an_adapter_beside_it_is_nearer_to_the_trainer():
    """A change as small as reinforcement's is lost where it is merged into bfloat16 weights."""
    config = TrainerConfig(learning_rate=2e-4, dtype="bfloat16")
    trainer = adapted(qwen(torch.float32), config)
    for _ in range(3):
        step(trainer, make_groups())
    base, adapter = parameters(trainer), trainer.adapter()
    exact = {name: tensor.float() for name, tensor in base.items()}

    def change(weights: Any) -> Tensor:
        """What the adapter does to the first layer's queries."""
        name = "model.layers.0.self_attn.q_proj"
        return weights[f"{name}.weight"].float() - exact[f"{name}.weight"]

    wanted = change(dict(merge(exact, adapter, LORA.scale)))
    merged = {n: t.bfloat16() for n, t in merge(exact, adapter, LORA.scale)}
    lost = (change(merged) - wanted).norm() / wanted.norm()
    assert lost > 0.5
    sampler = sampler_of(base, torch.bfloat16)
    sampler.load_adapter(1, adapter, LORA.scale)
    layer = sampler._runner.model.model.layers[0].self_attn.q_proj
    inputs = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    model = qwen(torch.float32)  # as the trainer has it, but not sharded
    peer = LoraAdapter(model, LORA, seed=0, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in peer.parameters().items():
            parameter.copy_(adapter[name])
        assert torch.equal(layer(inputs), model.model.layers[0].self_attn.q_proj(inputs))


def test_a_critic_in_shards_is_trained_beside_an_adapter_that_is_whole():
    """As bfloat16 has them, also on one rank."""
    trainer = adapted(
        qwen(torch.float32), TrainerConfig(learning_rate=1e-2, dtype="bfloat16"), name="ppo"
    )
    step(trainer, make_groups())
    before = {name: whole(tensor).clone() for name, tensor in trainer.state().items()}
    assert step(trainer, make_groups())["grad_norm"] > 0
    changed = {
        name.partition(".")[0] + "." + name.split(".")[1]
        for name, tensor in trainer.state().items()
        if name.startswith(("adapter.", "model.")) and not torch.equal(whole(tensor), before[name])
    }
    assert changed == {"adapter.model", "model.critic"}


def test_an_inference_engine_reads_with_the_adapter_of_the_version():
    """Its proximal log-probs are those of the merged model; the base alone gives others."""
    trainer = adapted(qwen())
    step(trainer, make_groups())
    base, group = parameters(trainer), make_groups()[0]

    def read(weights: Any, adapter: Any) -> Any:
        engine = HFInferenceEngine(config=TRAINER, device="cpu", policy=qwen(), proximal=True)
        engine.load_policy(1, weights, {})
        if adapter:
            engine.load_adapter(adapter, LORA.scale)
        return np.concatenate([reading.proximal for reading in engine.read_policy(group)])

    adapter = trainer.adapter()
    found, expected = read(base, adapter), read(dict(merge(base, adapter, LORA.scale)), {})
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - read(base, {})).max() > 1e-3


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda a, n: a.pop(f"{n}.lora_B"), "needs lora_A"),
        (lambda a, n: a.update({f"{n}.lora_A": a[f"{n}.lora_A"][:, 1:]}), "needs lora_A"),
        (lambda a, n: (a.pop(f"{n}.lora_A"), a.pop(f"{n}.lora_B")), "is missing"),
        (lambda a, n: a.update({"model.norm.lora_A": a[f"{n}.lora_A"]}), "no linear layer"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(harm: Any, says: str):
    """The error names the layer; the one before stays in use."""
    trainer = adapted(qwen(torch.float32))
    step(trainer, make_groups())
    sampler = sampler_of(parameters(trainer), torch.float32)
    sampler.load_adapter(1, trainer.adapter(), LORA.scale)
    before = sample(sampler)
    step(trainer, make_groups())
    adapter = dict(trainer.adapter())
    harm(adapter, "model.layers.1.mlp.up_proj")
    with pytest.raises(ValueError, match=says):
        sampler.load_adapter(2, adapter, LORA.scale)
    assert sampler.version == 1
    assert sample(sampler).logprobs.tolist() == before.logprobs.tolist()


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
    assert {tensor.dtype for tensor in parameters(trainer).values()} == {torch.bfloat16}


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
    """The model in shards, the adapter whole on both."""
    alone = adapted(qwen(), kl_coefficient=0.1)
    expected = [step(alone, make_groups()), step(alone, make_groups())]
    run_ranks(2, _rank, str(tmp_path / "store"), str(tmp_path))
    for rank in range(2):
        first, second, state = torch.load(tmp_path / str(rank))
        assert [first, second] == [pytest.approx(metrics, rel=1e-6) for metrics in expected]
        for name, tensor in alone.state().items():
            assert (state[name] - tensor).abs().max() < 1e-9, name
