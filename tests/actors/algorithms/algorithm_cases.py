"""Batches of made-up tokens, episodes, and resolved settings, for the tests of the algorithms."""

from typing import Any

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig, resolve
from actors.algorithms.contract import Episodes, TokenBatch


def settings(name: str = "grpo", **changes: Any) -> AlgorithmConfig:
    """As the trainer gives them to the functions of an algorithm."""
    return resolve(AlgorithmConfig(name=name, **changes))


def float64(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def token_batch(
    logprobs: Any, behaviour: Any, advantages: Any, sequences: Any = None, **more: Any
) -> TokenBatch:
    """In float64; one sequence of one turn unless said otherwise, every token of weight one and fresh."""
    logprobs = float64(logprobs)
    count = len(logprobs)
    if not logprobs.requires_grad:
        logprobs = logprobs.clone().requires_grad_()
    index = torch.zeros(count, dtype=torch.int64) if sequences is None else torch.tensor(sequences)
    given: dict[str, Any] = {
        "weights": torch.ones(count, dtype=torch.float64),
        "entropy": torch.full((count,), 0.5, dtype=torch.float64),
        "turns": index,
        "staleness": torch.zeros(count, dtype=torch.float64),
    }
    for name, value in more.items():
        given[name] = torch.tensor(value) if name == "turns" else float64(value)
    return TokenBatch(
        logprobs=logprobs,
        behaviour_logprobs=float64(behaviour),
        advantages=float64(advantages),
        sequences=index,
        **given,
    )


def episodes(*groups: list[list[list[float]]], **more: Any) -> Episodes:
    """Groups of samples of turns' tokens' rewards are flattened: groups[group][sample] is a list of turns, each turn
    a number of tokens and the reward at the last of them: [tokens, reward]."""
    returns, owners, samples, turns, rewards = [], [], [], [], []
    turn = -1
    for place, group in enumerate(groups):
        for sample in group:
            owners.append(place)
            returns.append(sum(reward for _, reward in sample))
            for tokens, reward in sample:
                turn += bool(tokens)
                samples += [len(returns) - 1] * int(tokens)
                turns += [turn] * int(tokens)
                rewards += [0.0] * (int(tokens) - 1) + [reward] * bool(tokens)
    return Episodes(
        returns=float64(returns),
        groups=torch.tensor(owners, dtype=torch.int64),
        samples=torch.tensor(samples, dtype=torch.int64),
        turns=torch.tensor(turns, dtype=torch.int64),
        rewards=float64(rewards),
        **{name: float64(value) for name, value in more.items()},
    )


def one_token_each(*groups: list[float]) -> Episodes:
    """Groups of samples of one token, given their rewards."""
    return episodes(*([[[1, reward]] for reward in group] for group in groups))
