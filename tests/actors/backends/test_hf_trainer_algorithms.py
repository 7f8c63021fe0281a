"""Every algorithm on the engine: the step is the same however it was split, and every knob changes it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch import Tensor
from trainer_cases import difference, engine, make_groups, parameters, qwen, step, whole

from actors.algorithms.config import CHOICES, PAPERS, AlgorithmConfig
from actors.backends.hf_trainer import HFTrainingEngine
from actors.episodes import Group
from actors.trainer.config import TrainerConfig

WHOLE = TrainerConfig(learning_rate=1e-2, max_grad_norm=1e9)
SPLIT = TrainerConfig(learning_rate=1e-2, max_grad_norm=1e9, micro_batch_tokens=40)
EXACT = 1e-6  # relative to the largest gradient; that of the issue, far above what is measured
Case = tuple[str, dict[str, Any]]
SPECIAL: list[Case] = [
    ("grpo", {"ratio_level": "chunk", "dual_clip": 3.0}),
    ("grpo", {"normalization": "batch", "entropy_coefficient": 0.1}),
    ("grpo", {"kl_coefficient": 0.1, "overlong_max_tokens": 6, "overlong_cache_tokens": 4}),
    ("rloo", {"kl_coefficient": 0.1, "correction": "sequence", "mask_level": "token"}),
    ("reinforce_pp", {"kl_coefficient": 0.1, "gamma": 0.9}),
    ("grpo", {"proximal": "recomputed", "correction": "token", "epochs": 2, "mini_batches": 2}),
    ("ppo", {"critic": "model", "epochs": 2, "gae_lambda": 0.9, "kl_coefficient": 0.1}),
    ("ppo", {"gae_level": "turn", "mini_batches": 3, "loss_aggregation": "chunk"}),
    ("decoupled_ppo", {"proximal": "interpolated", "mask_level": "sequence"}),
]
CASES: list[Case] = [
    *((name, {"loss_aggregation": how}) for name in PAPERS for how in CHOICES["loss_aggregation"]),
    *SPECIAL,
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer_of(case: Case, config: TrainerConfig, group: Any = None) -> HFTrainingEngine:
    name, settings = case
    return engine(qwen(), config, group, name=name, **settings)


def gradients(trainer: HFTrainingEngine) -> dict[str, Tensor]:
    """What the updates saw: the first moment, in which they are summed."""
    return {k: whole(v).clone() for k, v in trainer.state().items() if k.startswith("exp_avg.")}


def assert_same_gradient(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    largest = max(tensor.abs().max().item() for tensor in left.values())
    assert largest > 0
    assert difference(left, right) <= EXACT * largest


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_the_gradient_does_not_depend_on_how_the_step_was_split(case: Case):
    """In one call and one micro-batch, or in reverse order, group by group, in micro-batches of a sequence or two. The
    second step is away from the reference and the first values."""
    whole, split = trainer_of(case, WHOLE), trainer_of(case, SPLIT)
    groups = make_groups()
    for _ in range(2):
        expected = step(whole, groups)
        metrics = step(split, *([group] for group in reversed(groups)))
        assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert_same_gradient(gradients(whole), gradients(split))


def _rank(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    groups, ended = make_groups(), []
    for case in [(name, {}) for name in PAPERS] + SPECIAL:
        trainer = trainer_of(case, SPLIT, dist.group.WORLD)
        first = (
            step(trainer, groups[3:], groups[1:2])
            if rank
            else step(trainer, groups[:1], groups[2:3])
        )
        second = step(trainer, *([groups] if rank == 0 else []))  # rank 1 gets none
        ended.append((first, second, gradients(trainer)))
    torch.save(ended, f"{results}/{rank}")
    dist.destroy_process_group()


def test_two_ranks_take_the_step_that_one_takes(tmp_path: Path):
    """Real processes over gloo, every algorithm: statistics of the batch are those of all ranks."""
    run_ranks(2, _rank, str(tmp_path / "store"), str(tmp_path))
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for place, case in enumerate([(name, {}) for name in PAPERS] + SPECIAL):
        alone = trainer_of(case, WHOLE)
        expected = [step(alone, make_groups()) for _ in range(2)]
        for ended in ranks:
            *metrics, found = ended[place]
            assert metrics == [pytest.approx(each, rel=1e-6, abs=1e-9) for each in expected], case
            assert_same_gradient(gradients(alone), found)


# For each knob an algorithm and settings in which a change of that knob alone changes the step.
KNOBS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "name": ("grpo", {}, "rloo"),
    "clip_low": ("grpo", {}, 0.01),
    "clip_high": ("grpo", {}, 0.01),
    "dual_clip": ("grpo", {"clip_high": 0.01}, 1.01),
    "ratio_level": ("grpo", {}, "chunk"),
    "loss_aggregation": ("grpo", {}, "sequence"),
    "sum_length": ("dr_grpo", {}, 7),
    "entropy_coefficient": ("grpo", {}, 0.1),
    "epochs": ("grpo", {}, 2),
    "mini_batches": ("grpo", {}, 2),
    "normalization": ("grpo", {}, "none"),
    "gamma": ("ppo", {}, 0.5),
    "gae_lambda": ("ppo", {"epochs": 2}, 0.5),
    "gae_level": ("ppo", {"gamma": 0.9}, "turn"),
    "critic": ("ppo", {"epochs": 2}, "model"),
    "value_coefficient": ("ppo", {"epochs": 2}, 0.1),
    "value_clip": ("ppo", {"epochs": 3}, 1e-4),
    "proximal": ("grpo", {}, "recomputed"),
    "correction": ("rloo", {}, "token"),
    "correction_cap": ("rloo", {"correction": "token"}, 0.5),
    "mask_level": ("grpo", {}, "token"),
    "mask_low": ("grpo", {"mask_level": "token"}, 0.9),
    "mask_high": ("grpo", {"mask_level": "token"}, 1.1),
    "kl_coefficient": ("grpo", {"epochs": 2}, 0.5),
    "kl_estimator": ("grpo", {"epochs": 2, "kl_coefficient": 0.5}, "k2"),
    "kl_place": ("grpo", {"epochs": 2, "kl_coefficient": 0.5}, "reward"),
    "overlong_max_tokens": ("grpo", {}, 3),
    "overlong_cache_tokens": ("grpo", {"overlong_max_tokens": 5}, 4),
}


# What of [algorithm] says which groups are trained on is the conductor's, and tested with it.
CONDUCTORS = {"dynamic_sampling", "filter_key", "filter_range", "max_sampling_rounds"}


@pytest.mark.parametrize(
    "knob", [k for k in AlgorithmConfig.__struct_fields__ if k not in CONDUCTORS]
)
def test_every_knob_is_read(knob: str):
    """Turning it alone, the weights after a step are others. A knob without a line in KNOBS fails here too."""
    name, settings, turned = KNOBS[knob]
    groups = make_groups()
    before = engine(qwen(), WHOLE, **{"name": name, **settings})
    after = engine(qwen(), WHOLE, **{"name": name, **settings, knob: turned})
    default = msgspec.structs.asdict(AlgorithmConfig())[knob]
    assert settings.get(knob, default if knob != "name" else name) != turned
    step(before, groups)
    step(after, groups)
    shared = [name for name in parameters(before) if name in parameters(after)]
    apart = max(
        (parameters(before)[name] - parameters(after)[name]).abs().max().item() for name in shared
    )
    assert apart > 1e-7


def sampled_by(trainer: HFTrainingEngine, groups: list[Group]) -> list[Group]:
    """The groups with the log-probs that the engine's own policy gives their tokens."""
    groups = copy.deepcopy(groups)
    with torch.no_grad():
        for group in groups:
            for segment in group.segments:
                context: list[int] = []
                for turn in segment.turns:
                    context += turn.action.prompt.tolist()
                    start = len(context)
                    context += turn.action.tokens.tolist()
                    logits = trainer.model(input_ids=torch.tensor([context])).logits[0]
                    logprobs = logits.log_softmax(-1)[
                        range(start - 1, len(context) - 1), context[start:]
                    ]
                    turn.action.logprobs[:] = logprobs.numpy()
    return groups


@pytest.mark.parametrize("name", PAPERS)
def test_on_policy_ratios_are_one_and_nothing_is_clipped(name: str):
    """At the first update of samples of the same weights; the quantiles and the KL say so too."""
    trainer = engine(qwen(), WHOLE, name=name)
    metrics = step(trainer, sampled_by(trainer, make_groups()))
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["kl_sampler"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["clip_fraction"] == 0
    assert metrics["correction_mean"] == pytest.approx(1.0, abs=1e-6)
    quantiles = [metrics[f"ratio_p{q}"] for q in ("01", "50", "99")]
    assert quantiles == pytest.approx([1.0] * 3, abs=1e-4)
    assert metrics["grad_norm"] > 0


def test_the_reference_is_the_policy_before_the_first_step_also_after_a_restart():
    """KL is zero in the first step and grows; a restored run has the same reference, not its restored weights."""
    settings = {"kl_coefficient": 0.1}
    groups = make_groups()
    straight = engine(qwen(), WHOLE, **settings)
    straight.load_state(straight.state())  # as the trainer does with commit 0
    first, second = step(straight, groups), step(straight, groups)
    assert first["kl_reference"] == 0
    assert second["kl_reference"] > 0
    saved = {name: tensor.clone() for name, tensor in straight.state().items()}
    restored = engine(qwen(), WHOLE, **settings)
    restored.load_state(saved)
    assert step(restored, groups) == step(straight, groups)
    assert difference(parameters(restored), parameters(straight)) == 0
    without = {name: value for name, value in saved.items() if not name.startswith("reference.")}
    with pytest.raises(ValueError, match=r"reference\.model\.embed_tokens\.weight"):
        engine(qwen(), WHOLE, **settings).load_state(without)


@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_critic_learns_and_stays_with_the_trainer(critic: str):
    """The value loss falls; the critic is in the state, restored with it, and never published."""
    groups = make_groups()
    config = TrainerConfig(learning_rate=1e-2, max_grad_norm=1e9)
    trainer = engine(qwen(), config, name="ppo", critic=critic, epochs=2, value_clip=0.0)
    losses = [step(trainer, groups)["value_loss"] for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    assert not any("critic" in name for name in parameters(trainer))
    assert "model.critic.head.weight" in trainer.state()
    restored = engine(qwen(), config, name="ppo", critic=critic, epochs=2, value_clip=0.0)
    restored.load_state(trainer.state())
    assert step(restored, groups) == step(trainer, groups)


def test_an_episode_that_was_cut_off_is_worth_more_than_its_rewards():
    """Where it had not ended, the critic's value after the last token is added; where it had, nothing is."""
    [group] = make_groups(1)
    open_ended = cut_off(group)
    trainers = [engine(qwen(), WHOLE, name="ppo", value_coefficient=1.0) for _ in range(2)]
    state = {name: tensor.clone() for name, tensor in trainers[0].state().items()}
    state["model.critic.head.bias"] += 5.0
    for trainer in trainers:
        trainer.load_state(state)
    ended, cut = step(trainers[0], [group]), step(trainers[1], [open_ended])
    # Values of 5 are far off for rewards of at most 2, and right for what is cut off with 5 still to come.
    assert cut["value_loss"] < ended["value_loss"]


def cut_off(group: Group) -> Group:
    """The group, its episodes cut off rather than ended."""
    changed = copy.deepcopy(group)
    for segment in changed.segments:
        object.__setattr__(segment, "terminated", False)
        object.__setattr__(segment, "truncated", True)
    return changed


@pytest.mark.parametrize("name", PAPERS)
def test_a_step_without_groups_or_trained_tokens_changes_nothing(name: str):
    """Rows that are masked whole, lengths of zero, no groups at all: finite metrics, the same weights."""
    trainer = engine(qwen(), WHOLE, name=name)
    before = parameters(trainer)
    masked = make_groups()
    for group in masked:
        for segment in group.segments:
            for turn in segment.turns:
                turn.action.mask[:] = False
    for calls in ([], [masked]):
        metrics = step(trainer, *calls)
        assert metrics["tokens_trained"] == 0
        assert all(np.isfinite(value) for value in metrics.values())
    assert difference(parameters(trainer), before) == 0
