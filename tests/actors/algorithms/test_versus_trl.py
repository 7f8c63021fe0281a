"""Losses, their gradients and advantages against TRL's trainers, where TRL is installed.

`pip install 'flowd[bench]'`; its private methods are called, so this is about the version that is installed.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from algorithm_cases import episodes, float64, one_token_each, settings, token_batch
from torch import Tensor

from actors.algorithms import aggregation, registry
from actors.models.config import ModelConfig
from actors.models.loading import build_model

if any(importlib.util.find_spec(name) is None for name in ("trl", "datasets")):
    pytest.skip("TRL is not installed", allow_module_level=True)

LENGTHS = [1, 4, 2, 6, 3, 6]  # of answers; the longest is the generation budget
BUDGET = max(LENGTHS)
GROUP_REWARDS = [[1.0, 0.0, 0.0, 1.0, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 6]
MakeTrainer = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    """What TRL warns of is its business; nothing is looked for on the internet."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("HF_HUB_OFFLINE", "1")
        logging.getLogger("trl").setLevel(logging.ERROR)
        yield


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """A trainer of TRL's on a tiny model; rewards: what its reward function will give."""

    def make(kind: str = "GRPO", rewards: list[float] | None = None, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import trl
            from datasets import Dataset

            model, tokenizer = build_model(
                ModelConfig(hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8), seed=0
            )
            arguments = getattr(trl, f"{kind}Config")(
                output_dir=str(tmp_path),
                per_device_train_batch_size=6,
                num_generations=6,
                max_completion_length=BUDGET,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                **options,
            )
            trainer = getattr(trl, f"{kind}Trainer")(
                model=model,
                processing_class=tokenizer,
                reward_funcs=lambda completions, **_: rewards or [0.0] * len(completions),
                args=arguments,
                train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 6),
            )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


class Answers:
    """Random log-probs of answers of `LENGTHS` tokens, as TRL has them: [answers, BUDGET], padded."""

    def __init__(self, drift: float = 0.4) -> None:
        generator = torch.Generator().manual_seed(7)
        shape = (len(LENGTHS), BUDGET)
        self.mask = torch.arange(BUDGET) < torch.tensor(LENGTHS)[:, None]
        draw = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.logprobs = (-2 + 0.3 * draw()).requires_grad_()
        self.behaviour = self.logprobs.detach() + drift * draw()
        self.reference = self.logprobs.detach() + 0.2 * draw()
        self.advantages = float64([1.0, -1.3, 0.6, 2.0, -0.2, -2.1])

    def trl_loss(self, trainer: Any) -> Tensor:
        """By TRL's own code, which is told these log-probs in place of the model's."""
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
            self.logprobs,
            torch.zeros_like(self.behaviour),
            None,
        )
        tokens = torch.zeros(self.mask.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": tokens[:, :1],
            "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.int64),
            "completion_ids": tokens,
            "completion_mask": self.mask.long(),
            "advantages": self.advantages,
            "old_per_token_logps": self.behaviour,
            "old_logps": (self.behaviour * self.mask).sum(1),
            "ref_per_token_logps": self.reference,
            "num_items_in_batch": self.mask.sum(),
        }
        loss: Tensor = trainer._compute_loss(trainer.model, inputs)
        return loss

    def our_loss(self, name: str, **changes: Any) -> Tensor:
        """Of the flat tokens, over the global denominator."""
        config = settings(name, **changes)
        rows = self.mask.nonzero()[:, 0]
        made = episodes([[[length, 0.0]] for length in LENGTHS])
        batch = token_batch(
            [0.0] * len(rows),
            self.behaviour[self.mask],
            self.advantages[rows],
            rows.tolist(),
            weights=aggregation.weights(made, config),
            reference_logprobs=self.reference[self.mask],
        )
        object.__setattr__(batch, "logprobs", self.logprobs[self.mask])
        total, _ = registry.find(name).loss(batch, config)
        return total / aggregation.denominators(made, config).sum()

    def gradient(self, loss: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(loss, [self.logprobs])
        return found


@pytest.mark.parametrize(
    ("name", "ours", "trl"),
    [
        ("grpo", {}, {"loss_type": "dapo"}),
        ("grpo", {"loss_aggregation": "sequence"}, {"loss_type": "grpo"}),
        ("grpo", {"dual_clip": 1.5}, {"loss_type": "dapo", "delta": 1.5}),
        ("dr_grpo", {"sum_length": BUDGET}, {"loss_type": "dr_grpo"}),
        ("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        (
            "gspo",
            {"clip_low": 0.1, "clip_high": 0.15},
            {
                "loss_type": "grpo",
                "importance_sampling_level": "sequence",
                "epsilon": 0.1,
                "epsilon_high": 0.15,
            },
        ),
        ("cispo", {"clip_high": 0.3}, {"loss_type": "cispo", "epsilon_high": 1.3}),
    ],
    ids=["grpo", "grpo-sequence", "grpo-dual-clip", "dr_grpo", "dapo", "gspo", "cispo"],
)
@pytest.mark.parametrize("drift", [0.0, 0.4], ids=["first update", "off policy"])
def test_loss_and_gradient_are_those_of_trl(
    make_trainer: MakeTrainer, name: str, ours: dict[str, Any], trl: dict[str, Any], drift: float
) -> None:
    """Answers of several lengths; off policy, where some ratios are clipped, too."""
    answers = Answers(drift)
    expected = answers.trl_loss(make_trainer(**trl))
    found = answers.our_loss(name, **ours)
    assert torch.allclose(found, expected, rtol=1e-9)
    assert torch.allclose(answers.gradient(found), answers.gradient(expected), rtol=1e-9, atol=0)


def test_kl_in_the_loss_is_that_of_trl(make_trainer: MakeTrainer) -> None:
    """k3, weighed by its coefficient, as in GRPO's paper; TRL multiplies it by the ratio unless told not to."""
    answers = Answers()
    trainer = make_trainer(loss_type="dapo", use_bias_correction_kl=False)
    trainer.beta = 0.3  # set here, as the constructor would load a reference model
    expected = answers.trl_loss(trainer)
    found = answers.our_loss("grpo", kl_coefficient=0.3)
    assert torch.allclose(found, expected, rtol=1e-9)
    assert torch.allclose(answers.gradient(found), answers.gradient(expected), rtol=1e-9, atol=0)


def test_the_first_update_of_rloo_is_that_of_trl(make_trainer: MakeTrainer) -> None:
    """TRL clips the ratio of the whole answer; where it is one, that has REINFORCE's gradient."""
    answers = Answers(drift=0.0)
    expected = answers.gradient(answers.trl_loss(make_trainer("RLOO", beta=0.0)))
    assert torch.allclose(answers.gradient(answers.our_loss("rloo")), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "kind", "options", "factor", "tolerance"),
    [
        ("dr_grpo", "GRPO", {"scale_rewards": "none"}, 1.0, 1e-6),
        ("rloo", "RLOO", {"normalize_advantages": False, "beta": 0.0}, 1.0, 1e-6),
        # TRL takes the sample's deviation and adds 1e-4 to it, the paper and we take the population's.
        ("grpo", "GRPO", {"scale_rewards": "group"}, (6 / 5) ** 0.5, 1e-3),
    ],
    ids=["dr_grpo", "rloo", "grpo"],
)
@pytest.mark.parametrize("rewards", GROUP_REWARDS, ids=["mixed", "one right", "all equal"])
def test_advantages_are_those_of_trl(
    make_trainer: MakeTrainer,
    name: str,
    kind: str,
    options: dict[str, Any],
    factor: float,
    tolerance: float,
    rewards: list[float],
) -> None:
    """TRL generates with its tiny model; the rewards are given."""
    trainer = make_trainer(kind, rewards, **options)
    scored = trainer._generate_and_score_completions([{"prompt": "1+1="}] * 6)
    made = one_token_each(rewards)
    found = registry.find(name).advantages(made, settings(name)).advantages
    expected = scored["advantages"].double() * factor
    assert torch.allclose(found, expected, rtol=tolerance, atol=1e-6)
