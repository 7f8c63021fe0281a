"""Advantage estimates that algorithms share, of flat tensors; what is adjacent belongs together."""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Episodes

STD_FLOOR = 1e-6  # nearly equal rewards are not blown up


def count(index: Tensor, size: int) -> Tensor:
    """How often each number below `size` is in `index`; float64 [size]."""
    return torch.bincount(index, minlength=size).double()


def sums(values: Tensor, index: Tensor, size: int) -> Tensor:
    """The sum of the values with each number below `size`; [size]."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, values)


def centre_by_group(returns: Tensor, groups: Tensor) -> Tensor:
    """Each return minus the mean of its group; zero in a group of one. [samples]"""
    size = _size(groups)
    return returns - (sums(returns, groups, size) / count(groups, size))[groups]


def leave_one_out(returns: Tensor, groups: Tensor) -> Tensor:
    """Each return minus the mean of the others of its group; zero in a group of one. [samples]"""
    members = count(groups, _size(groups))[groups]
    return centre_by_group(returns, groups) * members / (members - 1).clamp(min=1)


def divide_by_group_std(centred: Tensor, groups: Tensor) -> Tensor:
    """Divided by the (population) standard deviation of the group; zero where all are (nearly) equal. [samples]"""
    size = _size(groups)
    centred_again = centre_by_group(centred, groups)
    variance = sums(centred_again.square(), groups, size) / count(groups, size)
    std = variance.sqrt()[groups]
    return torch.where(std > STD_FLOOR, centred / std.clamp(min=STD_FLOOR), 0.0)


def of_tokens(centred: Tensor, episodes: Episodes, config: AlgorithmConfig) -> Tensor:
    """Advantages of samples, divided as the config says, given to their tokens. [tokens]"""
    if config.normalization == "group":
        centred = divide_by_group_std(centred, episodes.groups)
    return centred[episodes.samples]


def normalize_by_batch(advantages: Tensor, mean: float, std: float) -> Tensor:
    """Less the mean, over the standard deviation of the batch; zero where all are (nearly) equal."""
    if std <= STD_FLOOR:
        return torch.zeros_like(advantages)
    return (advantages - mean) / std


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    last_values: Tensor,
    samples: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """Schulman et al. 2015, https://arxiv.org/abs/1506.02438, equation 16, from each sample's last step to its first.

    rewards, values, samples: [steps]    last_values: [samples], at the state after the last step
    """
    after = last_values.tolist()
    advantages = [0.0] * len(rewards)
    sample, next_value, ahead = -1, 0.0, 0.0
    steps = zip(rewards.tolist(), values.tolist(), samples.tolist(), strict=True)
    for place, (reward, value, owner) in reversed(list(enumerate(steps))):
        if owner != sample:
            sample, next_value, ahead = owner, after[owner], 0.0
        ahead = reward + gamma * next_value - value + gamma * lambda_ * ahead
        advantages[place], next_value = ahead, value
    return torch.tensor(advantages, dtype=rewards.dtype, device=rewards.device)


def episode_advantages(
    episodes: Episodes, values: Tensor, last_values: Tensor, config: AlgorithmConfig
) -> Tensor:
    """`generalized_advantages` over tokens or turns, as the config says. [tokens]"""
    rewards, samples = episodes.rewards, episodes.samples
    if config.gae_level == "turn":
        size = _size(episodes.turns)
        first = torch.ones_like(episodes.turns, dtype=torch.bool)
        first[1:] = episodes.turns[1:] != episodes.turns[:-1]
        rewards = sums(rewards, episodes.turns, size)
        values, samples = values[first], samples[first]
    estimates = generalized_advantages(
        rewards, values, last_values, samples, gamma=config.gamma, lambda_=config.gae_lambda
    )
    return estimates[episodes.turns] if config.gae_level == "turn" else estimates


def _size(index: Tensor) -> int:
    return int(index[-1]) + 1 if len(index) else 0
