"""The training engine against a slow obvious reference, and its step under every way to split it."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from trainer_cases import (
    SHAPE,
    TRAINER,
    VOCABULARY,
    difference,
    engine,
    make_groups,
    parameters,
    qwen,
    step,
)
from transformers import Gemma2Config, Gemma2ForCausalLM

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends import token_logprobs
from actors.backends.contract import GenerationRequest
from actors.backends.hf_engine import HFGenerationEngine
from actors.backends.hf_trainer import HFTrainingEngine
from actors.backends.host_copies import HostCopies
from actors.episodes import Action, Group, Sampling, Segment, Turn
from actors.randomness import fold
from actors.trainer.config import TrainerConfig


def gemma(dtype: torch.dtype = torch.float64) -> Gemma2ForCausalLM:
    """Caps its logits softly, which changes them a lot at this size."""
    torch.manual_seed(0)
    return (
        Gemma2ForCausalLM(
            Gemma2Config(**SHAPE, final_logit_softcapping=0.5, attn_logit_softcapping=None)
        )
        .to(dtype)
        .eval()
    )


def reference_gradients(model: Any, groups: list[Group], config: AlgorithmConfig) -> list[Tensor]:
    """Token by token: no padding, no batches, no vectors. The division and the loss written out."""
    terms: list[tuple[Tensor, float]] = []
    sequences = 0
    for group in groups:
        rewards = np.array(group.rewards, dtype=np.float64)
        advantages = (rewards - rewards.mean()) / max(rewards.std(), 1e-6)
        for segment, advantage in zip(group.segments, advantages.tolist(), strict=True):
            context: list[int] = []
            trained: list[tuple[int, float]] = []
            for turn in segment.turns:
                context += turn.action.prompt.tolist()
                for token, mask, logprob in zip(
                    turn.action.tokens, turn.action.mask, turn.action.logprobs, strict=True
                ):
                    if mask:
                        trained.append((len(context), float(logprob)))
                    context.append(int(token))
            sequences += bool(trained)
            logprobs = model(input_ids=torch.tensor([context])).logits[0].log_softmax(-1)
            for place, behaviour in trained:
                ratio = (logprobs[place - 1, context[place]] - behaviour).exp()
                clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
                surrogate = torch.min(ratio * advantage, clipped * advantage)
                terms.append((-surrogate, 1 / len(trained)))
    if config.loss_aggregation == "token":
        loss = sum(term for term, _ in terms) / len(terms)
    else:
        loss = sum(term * share for term, share in terms) / sequences
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_step_equals_the_slow_reference(aggregation: str):
    """Several turns, masks, clipping, both aggregations: the same weights after AdamW."""
    groups, model = make_groups(), qwen()
    config = AlgorithmConfig(loss_aggregation=aggregation)
    slow = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        slow.parameters(),
        lr=TRAINER.learning_rate,
        betas=TRAINER.betas,
        weight_decay=TRAINER.weight_decay,
    )
    for parameter, gradient in zip(
        slow.parameters(), reference_gradients(slow, groups, config), strict=True
    ):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(slow.parameters(), TRAINER.max_grad_norm)
    optimizer.step()
    trainer = engine(model, loss_aggregation=aggregation)
    metrics = step(trainer, groups)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    assert metrics["clip_fraction"] > 0.1  # the case is worth testing
    # transformers' norms compute in float32 inside, in either order.
    assert difference(parameters(trainer), dict(slow.named_parameters())) < 1e-5


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
@pytest.mark.parametrize(
    "config",
    [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 40},
        {"gradient_checkpointing": True},
    ],
)
def test_the_step_does_not_depend_on_how_it_was_computed(aggregation: str, config: dict[str, Any]):
    """One sequence at a time, small micro-batches, recomputed activations; groups in one call or in five."""
    groups = make_groups()
    whole = engine(qwen(), loss_aggregation=aggregation)
    expected = step(whole, groups)
    other = engine(
        qwen(),
        TrainerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, **config),
        loss_aggregation=aggregation,
    )
    metrics = step(other, *([group] for group in reversed(groups)))
    assert metrics == pytest.approx(expected, rel=1e-9)
    assert difference(parameters(other), parameters(whole)) < 1e-9


def test_the_head_in_chunks_gives_the_same_step(monkeypatch: pytest.MonkeyPatch):
    """Logits that are computed again in the backward pass."""
    groups = make_groups()
    whole = engine(qwen(), entropy_coefficient=0.1)
    expected = step(whole, groups)
    monkeypatch.setitem(token_logprobs.CHUNK_ELEMENTS, "cpu", 5 * VOCABULARY)
    chunked = engine(qwen(), entropy_coefficient=0.1)
    assert step(chunked, groups) == pytest.approx(expected, rel=1e-9)
    assert difference(parameters(chunked), parameters(whole)) < 1e-9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler comes upon many of torch's own
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "gradient_checkpointing": True}])
def test_compiled_blocks_give_the_same_step(changes: dict[str, Any]):
    """Rows of several lengths, the second of which makes shapes dynamic; sharded and recomputed too."""
    found = []
    for compiled in (False, True):
        config = TrainerConfig(
            learning_rate=1e-2, micro_batch_tokens=40, compile=compiled, **changes
        )
        trainer = engine(qwen(torch.float32), config)
        found.append([step(trainer, make_groups()) for _ in range(2)])
    for eager, faster in zip(*found, strict=True):
        assert faster["loss"] == pytest.approx(eager["loss"], abs=2e-2 if changes else 1e-5)
        assert faster["grad_norm"] == pytest.approx(
            eager["grad_norm"], rel=0.1 if changes else 1e-4
        )


def _rank(rank: int, store: str, results: str) -> None:
    """One of two ranks. It is spawned, so that neither shares anything with the other."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    groups = make_groups()
    trainer = engine(qwen(), group=dist.group.WORLD)
    first = step(trainer, groups[:1] if rank == 0 else groups[1:])
    second = step(trainer, *([groups] if rank == 0 else []))  # rank 1 gets none
    torch.save((first, second, parameters(trainer)), f"{results}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_take_the_step_that_one_takes(tmp_path: Path):
    """Real processes over gloo; groups split unevenly, and a rank that gets none."""
    alone = engine(qwen())
    expected = [step(alone, make_groups()), step(alone, make_groups())]
    run_ranks(2, _rank, str(tmp_path / "store"), str(tmp_path))
    for rank in range(2):
        first, second, weights = torch.load(tmp_path / str(rank))
        assert [first, second] == [pytest.approx(metrics, rel=1e-9) for metrics in expected]
        assert difference(weights, parameters(alone)) < 1e-9


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=3),
    Sampling(vocabulary=(5, 20)),
    Sampling(temperature=1.5, top_k=4, vocabulary=(3, 16)),
    Sampling(temperature=0.0),
]


def sample_groups(model: Any, samplings: list[Sampling]) -> list[Group]:
    """A group per transform, sampled by the generation engine; half of the members are rewarded."""
    sampler = HFGenerationEngine(
        copy.deepcopy(model),
        max_running=64,
        max_context_tokens=32,
        pad_token=0,
        dtype=torch.float64,
    )
    sampler.load_weights(0, dict(model.named_parameters()))
    groups = []
    for index, sampling in enumerate(samplings):
        prompt = np.arange(3, 8 + index, dtype=np.int32)
        for sample in range(4):
            sampler.add(
                GenerationRequest(
                    request_id=sample,
                    context=prompt,
                    max_new_tokens=4 + sample,
                    key=fold(index, sample),
                    sampling=sampling,
                )
            )
        ended = []
        while sampler.num_running:
            ended += sampler.step()
        segments = [
            Segment(
                sample=each.request_id,
                turns=(
                    Turn(
                        observation=None,
                        reward=float(each.request_id % 2),
                        action=Action(
                            prompt=prompt,
                            tokens=each.tokens,
                            logprobs=each.logprobs,
                            versions=each.versions,
                            mask=np.ones(len(each.tokens), dtype=np.bool_),
                            sampling=sampling,
                        ),
                    ),
                ),
            )
            for each in ended
        ]
        groups.append(
            Group(group=index, attempt=0, run_attempt=0, seed=0, segments=tuple(segments))
        )
    return groups


@pytest.mark.parametrize("make_model", [qwen, gemma])
def test_log_probs_are_those_of_the_sampler(make_model: Any):
    """Every transform, several in one step, also where the model does more than its head to the logits."""
    model = make_model()
    groups = sample_groups(model, SAMPLINGS)
    metrics = step(engine(model), groups)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)  # the sampler's are float32
    assert abs(metrics["kl_sampler"]) < 1e-12
    assert metrics["tokens_trained"] == sum(group.num_tokens for group in groups)


def test_dropout_stays_off():
    """A policy with dropout would be another one than the one that sampled; recomputing changes nothing in that."""
    model = qwen(attention_dropout=0.5)
    groups = sample_groups(model, [Sampling()])
    config = TrainerConfig(gradient_checkpointing=True)
    assert abs(step(engine(model, config), groups)["kl_sampler"]) < 1e-12


def test_a_token_outside_the_trainers_top_k_keeps_its_gradient():
    """It was in the sampler's; newer weights may rank it lower."""
    model = qwen()
    [group] = sample_groups(model, [Sampling(top_k=2)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.0)
    metrics = step(engine(model), [group])
    assert np.isfinite(metrics["loss"])
    assert 0 < metrics["grad_norm"] < np.inf


def test_segments_of_one_episode_share_the_samples_advantage():
    """Cut into segments of a turn each, episodes give the same advantages; the context starts anew at the cut."""
    [group] = make_groups(1, members=2, turns=1)
    right, wrong = (
        Segment(sample=i, turns=(group.segments[i].turns[0],), terminated=True) for i in (0, 1)
    )

    def with_reward(segment: Segment, reward: float) -> Segment:
        turn = segment.turns[0]
        return Segment(
            sample=segment.sample,
            turns=(Turn(observation=None, action=turn.action, reward=reward),),
        )

    pieces = (
        with_reward(right, 0.0),  # earns nothing itself; its episode does
        with_reward(right, 1.0),
        with_reward(wrong, 0.0),
        with_reward(wrong, 0.0),
    )
    cut = Group(group=0, attempt=0, run_attempt=0, seed=0, segments=pieces)
    plain = Group(
        group=0,
        attempt=0,
        run_attempt=0,
        seed=0,
        segments=(with_reward(right, 1.0), with_reward(wrong, 0.0)),
    )
    assert step(engine(qwen()), [cut])["loss"] == pytest.approx(
        step(engine(qwen()), [plain])["loss"], rel=1e-9
    )


def test_a_restored_engine_continues_as_if_nothing_had_happened():
    """Weights, moments and both counters, also after a step that was left out for its gradient."""
    config = TrainerConfig(learning_rate=1e-2, lr_warmup_steps=5)
    groups = make_groups()
    straight = engine(qwen(), config)
    step(straight, groups)
    step(straight, broken(groups))
    saved = copied(straight.state())
    frozen = copied(saved)
    restored = engine(qwen(), config)
    step(restored, groups[:1])  # whatever it did before is forgotten
    restored.load_state(saved)
    assert step(restored, groups) == step(straight, groups)
    assert difference(parameters(restored), parameters(straight)) == 0
    assert all(
        torch.equal(saved[name], frozen[name]) for name in frozen
    )  # it copies what it is given


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state as it is now: the next step changes what the engine gave."""
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_state_from_before_the_first_step_forgets_the_moments():
    """A run rolled back to its start takes its first step anew."""
    trainer = engine(qwen())
    start = copied(trainer.state())
    first = step(trainer, make_groups())
    after = parameters(trainer)
    trainer.load_state(start)
    assert step(trainer, make_groups()) == first
    assert difference(parameters(trainer), after) == 0


def test_a_state_of_another_model_is_refused():
    """It names what does not fit and changes nothing."""
    trainer = engine(qwen())
    before = parameters(trainer)
    state = engine(qwen(hidden_size=32)).state()
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight.* and \d+ more"):
        trainer.load_state(state)
    assert difference(parameters(trainer), before) == 0


def broken(groups: list[Group]) -> list[Group]:
    """Groups with a log-prob that is not a number."""
    groups = copy.deepcopy(groups)
    groups[0].segments[0].turns[0].action.logprobs[:] = np.nan
    groups[0].segments[0].turns[0].action.mask[:] = True
    return groups


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    """The metrics show it; the guards end the job."""
    trainer = engine(qwen())
    before = parameters(trainer)
    metrics = step(trainer, broken(make_groups()))
    assert not np.isfinite((metrics["loss"], metrics["grad_norm"])).all()
    assert difference(parameters(trainer), before) == 0


def test_a_step_without_tokens_changes_nothing():
    """No division by zero, no weight decay, no moments."""
    trainer = engine(qwen())
    before = parameters(trainer)
    metrics = step(trainer)
    assert metrics["tokens_trained"] == 0
    assert all(np.isfinite(value) for value in metrics.values())
    assert difference(parameters(trainer), before) == 0


def test_the_learning_rate_rises_linearly():
    """Over lr_warmup_steps, then it stays."""
    trainer = engine(qwen(), TrainerConfig(learning_rate=0.4, lr_warmup_steps=4))
    rates = [step(trainer, make_groups(1))["learning_rate"] for _ in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_weights_go_by_hugging_face_names_with_ties_once():
    """The masters, not a copy; a generation engine takes them as they are."""
    model = qwen(torch.float32)
    trainer = HFTrainingEngine(
        model,
        algorithm=registry.find("grpo"),
        algorithm_config=AlgorithmConfig(),
        config=TRAINER,
    )
    weights = dict(trainer.weights())
    assert "lm_head.weight" not in weights
    parameters = dict(model.named_parameters())
    assert all(weights[name].data_ptr() == p.data_ptr() for name, p in parameters.items())
    sampler = HFGenerationEngine(
        qwen(torch.float32), max_running=1, max_context_tokens=8, pad_token=0
    )
    sampler.load_weights(1, weights)


def test_bfloat16_computes_close_to_float32_with_master_weights():
    """Autocast: the parameters and the moments stay float32."""
    groups = make_groups()
    exact = step(engine(qwen(torch.float32)), groups)
    trainer = engine(qwen(torch.float32), TrainerConfig(dtype="bfloat16"))
    metrics = step(trainer, groups)
    assert metrics["loss"] == pytest.approx(exact["loss"], abs=0.02)
    assert metrics["loss"] != exact["loss"]
    assert {tensor.dtype for name, tensor in trainer.state().items() if "." in name} == {
        torch.float32
    }


def test_memory_is_that_of_weights_and_moments_and_none_when_offloaded():
    """Gradients count while they exist."""
    trainer = engine(qwen(torch.float32))
    weights_bytes = sum(tensor.nbytes for tensor in parameters(trainer).values())
    at_start = trainer.memory_bytes()
    assert weights_bytes <= at_start < 1.1 * weights_bytes  # and the buffers
    trainer.begin_step()
    trainer.accumulate(make_groups())
    assert trainer.memory_bytes() >= 2 * weights_bytes
    trainer.finish_step()
    assert trainer.memory_bytes() >= 3 * weights_bytes
    before = parameters(trainer)
    trainer.offload()
    assert trainer.memory_bytes() == 0
    trainer.onload()
    assert trainer.memory_bytes() >= 3 * weights_bytes
    assert difference(parameters(trainer), before) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nobody_holds_what_was_moved(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """Memory that is moved elsewhere is free, also where it was sharded; a GPU is played by the CPU."""

    def move(self: HostCopies, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.data = tensor.data.clone()

    monkeypatch.setattr(HostCopies, "move_to_host", move)
    trainer = HFTrainingEngine(
        qwen(torch.float32),
        algorithm=registry.find("grpo"),
        algorithm_config=AlgorithmConfig(),
        config=msgspec.structs.replace(TRAINER, dtype=dtype),
    )
    step(trainer, make_groups())
    before = parameters(trainer)
    places = [StorageWeakRef(tensor.untyped_storage()) for tensor in trainer._tensors()]
    trainer.device = torch.device("meta")  # anything but the host
    trainer.offload()
    trainer.device = torch.device("cpu")
    assert [place for place in places if not place.expired()] == []
    trainer._resident = True
    assert difference(parameters(trainer), before) == 0
    assert step(trainer, make_groups())["grad_norm"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_it_offloads_and_comes_back():
    """Steps with an offload in between equal steps without; the memory is really given up."""
    groups = make_groups()
    stays, moves = (
        HFTrainingEngine(
            qwen(torch.float32, hidden_size=512, intermediate_size=2048, head_dim=256),
            algorithm=registry.find("grpo"),
            algorithm_config=AlgorithmConfig(),
            config=TRAINER,
            device="cuda",
        )
        for _ in range(2)
    )
    for _ in range(2):
        expected, metrics = step(stays, groups), step(moves, groups)
        assert metrics == pytest.approx(expected, rel=1e-4)
        held, reported = torch.cuda.memory_allocated(), moves.memory_bytes()
        moves.offload()
        assert held - torch.cuda.memory_allocated() >= 0.95 * reported
        assert moves.memory_bytes() == 0
        assert {tensor.device.type for _, tensor in moves.weights()} == {"cpu"}
        moves.onload()
    assert {tensor.device.type for _, tensor in moves.weights()} == {"cuda"}
