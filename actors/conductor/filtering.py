"""Dynamic sampling: which finished groups a step is trained on, and how often it may be sampled again. Pure.

DAPO, https://arxiv.org/abs/2503.14476, section 3.2: groups whose samples all have one reward have no advantage, so they
are left out and others are sampled in their place until the batch is full. With `filter_range` so are those that are
too hard or too easy.
"""

import math
from collections.abc import Mapping, Sequence

from actors.algorithms.config import AlgorithmConfig, resolve
from actors.errors import ActorError

REWARD = "reward"


def can_teach(rewards: Sequence[float]) -> bool:
    """Whether a group's samples differ, so that comparing them says something (section 3.2, equation 11, for any
    rewards)."""
    return len(rewards) > 0 and min(rewards) != max(rewards)


class GroupFilter:
    """What the job asks of its groups."""

    def __init__(self, config: AlgorithmConfig, groups_per_step: int) -> None:
        self._config = resolve(config)
        self._groups_per_step = groups_per_step
        self.active = bool(self._config.dynamic_sampling) or self._config.filter_range is not None

    def keeps(self, rewards: Sequence[float], info: Mapping[str, float]) -> bool:
        """Whether a group is to be trained on.

        rewards: of its samples    info: means over its samples of the task's own numbers
        Raises ActorError where the task does not give the number that `filter_key` names.
        """
        if self._config.dynamic_sampling and not can_teach(rewards):
            return False
        if self._config.filter_range is None:
            return True
        low, high = self._config.filter_range
        return low <= self._mean(rewards, info) <= high

    @property
    def most_filtered(self) -> float:
        """Groups that may be left out of a step; after that it takes what comes."""
        rounds = self._config.max_sampling_rounds
        return (rounds - 1) * self._groups_per_step if rounds else math.inf

    def nothing_left(self, step: int, trained: int, filtered: Sequence[Sequence[float]]) -> str:
        """Why to end a job that trained a step on `trained` groups of which none was wanted.

        filtered: the rewards of each group that was left out of it
        """
        alike = [rewards[0] for rewards in filtered if rewards and not can_teach(rewards)]
        told = f"{len(alike)} of those left out had one reward for all samples"
        if alike and min(alike) == max(alike):
            told += f", always {alike[0]:g}"
        return (
            f"step {step}: not one of {trained + len(filtered)} groups is worth training on ({told}): all prompts are "
            "too easy or too hard for this policy; change the data, sample more of each (rollout.group_size), allow "
            "more rounds (algorithm.max_sampling_rounds), or set algorithm.dynamic_sampling = false"
        )

    def _mean(self, rewards: Sequence[float], info: Mapping[str, float]) -> float:
        key = self._config.filter_key
        if key == REWARD:
            return sum(rewards) / max(len(rewards), 1)
        if key not in info:
            known = ", ".join([REWARD, *sorted(info)])
            raise ActorError(
                f'algorithm.filter_key = "{key}" is not a number that the task gives with its episodes: use {known}'
            )
        return info[key]
