"""What one token counts in the loss, and what a step's sum is divided by."""

import torch
from torch import Tensor

from actors.algorithms.config import AlgorithmConfig
from actors.algorithms.contract import Episodes
from actors.algorithms.estimates import count, sums


def weights(episodes: Episodes, config: AlgorithmConfig) -> Tensor:
    """The same everywhere ("token", "sum"), or a token's share of its sequence or chunk. float64 [tokens]"""
    tokens = episodes.samples
    match config.loss_aggregation:
        case "token":
            return torch.ones(len(tokens), dtype=torch.float64)
        case "sum":
            return torch.full((len(tokens),), 1.0 / config.sum_length, dtype=torch.float64)
        case "sequence":
            return 1.0 / count(tokens, len(episodes.returns))[tokens]
        case "chunk":
            return 1.0 / count(episodes.turns, len(tokens))[episodes.turns]
    raise AssertionError(config.loss_aggregation)


def denominators(episodes: Episodes, config: AlgorithmConfig) -> Tensor:
    """What each group adds to the denominator: its tokens ("token"), its turns ("chunk"), or its samples that have a
    trained token ("sequence", "sum"). float64 [groups]"""
    if not len(episodes.groups):
        return torch.zeros(0, dtype=torch.float64)
    size = int(episodes.groups[-1]) + 1
    of_token = episodes.groups[episodes.samples]
    match config.loss_aggregation:
        case "token":
            return count(of_token, size)
        case "chunk":
            first = torch.ones_like(episodes.turns, dtype=torch.bool)
            first[1:] = episodes.turns[1:] != episodes.turns[:-1]
            return count(of_token[first], size)
    trained = count(episodes.samples, len(episodes.returns)) > 0
    return sums(trained.double(), episodes.groups, size)
