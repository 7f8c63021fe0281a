"""A tiny model, made-up groups, and steps of an engine on them, for tests of training engines."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends.hf_trainer import HFTrainingEngine
from actors.episodes import Action, Group, Segment, Turn
from actors.trainer.config import TrainerConfig

VOCABULARY = 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
TRAINER = TrainerConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)


def qwen(dtype: torch.dtype = torch.float64, **changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**{**SHAPE, "tie_word_embeddings": True, **changes})
    return Qwen2ForCausalLM(config).to(dtype).eval()


def engine(
    model: Any,
    config: TrainerConfig = TRAINER,
    group: Any = None,
    name: str = "grpo",
    **settings: Any,
) -> HFTrainingEngine:
    return HFTrainingEngine(
        model,
        algorithm=registry.find(name),
        algorithm_config=AlgorithmConfig(name=name, **settings),
        config=config,
        process_group=group,
    )


def make_groups(count: int = 5, *, members: int = 3, turns: int = 2) -> list[Group]:
    """Groups of episodes of several lengths and turns, some tokens masked, with made-up log-probs near the model's."""
    random = np.random.default_rng(7)

    def turn(reward: float) -> Turn:
        length = int(random.integers(1, 6))
        tokens, prompt = (
            random.integers(3, VOCABULARY, n).astype(np.int32)
            for n in (length, int(random.integers(1, 5)))
        )
        return Turn(
            observation=None,
            reward=reward,
            action=Action(
                prompt=prompt,
                tokens=tokens,
                logprobs=random.normal(-3.2, 0.5, length).astype(np.float32),
                versions=np.zeros(length, dtype=np.int32),
                mask=random.random(length) < 0.8,
            ),
        )

    return [
        Group(
            group=index,
            attempt=0,
            run_attempt=0,
            seed=index,
            segments=tuple(
                Segment(
                    sample=sample,
                    turns=tuple(
                        turn(float(random.integers(0, 2)))
                        for _ in range(int(random.integers(1, turns + 1)))
                    ),
                )
                for sample in range(members)
            ),
        )
        for index in range(count)
    ]


def step(trainer: HFTrainingEngine, *calls: list[Group]) -> dict[str, float]:
    trainer.begin_step()
    for groups in calls:
        trainer.accumulate(groups)
    return trainer.finish_step()


def parameters(trainer: HFTrainingEngine) -> dict[str, Tensor]:
    """The policy's, whole. Collective."""
    return {name: whole(tensor).clone() for name, tensor in trainer.weights()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)
