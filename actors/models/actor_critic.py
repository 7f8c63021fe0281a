"""The actor-critic for states and images: an MLP each for actor and critic, behind a CNN that both share."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from actors.models.action_policy import Acted, ActionPolicy, Observations, Read
from actors.models.config import PolicyConfig
from actors.models.distributions import Bounds, Categorical, Gaussian
from actors.models.encoders import ImageEncoder, StateNormalizer, is_image
from actors.models.running_moments import RunningMoments

LOG_STD_RANGE = (-5.0, 2.0)  # of a deviation that the network says; exp of more is no use to anyone


class ActorCritic(ActionPolicy):
    """Actions are Gaussian, or one of a finite number; a unit is a step of the chunk.

    Weights begin orthogonal, the actor's last layer a hundred times smaller (Andrychowicz et al. 2020,
    arXiv:2006.05990, section 3.2), so that the first policy is the same for every observation.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.chunk, self.units_per_step = config.chunk, 1
        self.draws = config.chunk * (1 if config.discrete else config.action)
        self._action, self._discrete = config.action, config.discrete
        self._squash, self._std_by_state = config.squash, config.std_by_state
        self.state = StateNormalizer(config.observation, normalize=config.normalize_observations)
        images = any(is_image(shape) for shape in config.observation.values())
        self.image = ImageEncoder(config.observation, config.image_width) if images else None
        features = self.state.size + (config.image_width if images else 0)
        outputs = config.chunk * config.action
        by_state = config.std_by_state and not config.discrete
        self.actor = _mlp(features, config.hidden, outputs * (2 if by_state else 1), gain=0.01)
        self.values = _mlp(features, config.hidden, 1, gain=1.0)
        self.log_std: nn.Parameter | None = None
        self._initial_log_std = config.initial_log_std
        if not config.discrete and not by_state:
            self.log_std = nn.Parameter(torch.full((config.action,), config.initial_log_std))
        self.returns = RunningMoments(1) if config.normalize_returns else None
        self.bounds = Bounds(config)

    @torch.no_grad()
    def act(self, observations: Observations, uniforms: Tensor, *, greedy: bool) -> Acted:
        features = self._features(observations)
        distribution = self._distribution(features)
        if isinstance(distribution, Categorical):
            sample = distribution.mode() if greedy else distribution.sample(uniforms)
            actions = sample
        else:
            drawn = uniforms.view(len(uniforms), self.chunk, self._action)
            sample = distribution.mode() if greedy else distribution.sample(drawn)
            inner = distribution.action(sample)
            actions = self.bounds(inner).float()
        return Acted(
            actions=actions,
            logprobs=distribution.log_prob(sample).float(),
            values=self._values(features).float(),
            recompute={"sample": sample},
        )

    def evaluate(self, observations: Observations, recompute: Mapping[str, Tensor]) -> Read:
        features = self._features(observations)
        distribution = self._distribution(features)
        sample = recompute["sample"]
        if isinstance(distribution, Categorical):
            entropy = distribution.entropy()
        else:
            sample = sample.to(features.dtype)
            entropy = distribution.entropy(sample)
        return Read(
            logprobs=distribution.log_prob(sample), entropy=entropy, values=self._values(features)
        )

    def value(self, observations: Observations) -> Tensor:
        return self._values(self._features(observations))

    def observed(self) -> dict[str, RunningMoments]:
        return {} if self.state.moments is None else {"state": self.state.moments}

    def rows(self, observations: Observations) -> dict[str, Tensor]:
        return {} if self.state.moments is None else {"state": self.state.rows(observations)}

    def _features(self, observations: Observations) -> Tensor:
        dtype = next(self.parameters()).dtype
        parts = [self.state(observations).to(dtype)] if self.state.size else []
        if self.image is not None:
            parts.append(self.image(observations))
        return torch.cat(parts, dim=1)

    def _distribution(self, features: Tensor) -> Gaussian | Categorical:
        outputs = self.actor(features).view(len(features), self.chunk, -1)
        if self._discrete:
            return Categorical(outputs)
        if self.log_std is not None:
            return Gaussian(outputs, self.log_std.expand_as(outputs), self._squash)
        mean, log_std = outputs.chunk(2, dim=-1)
        log_std = (log_std + self._initial_log_std).clamp(*LOG_STD_RANGE)
        return Gaussian(mean, log_std, self._squash)

    def _values(self, features: Tensor) -> Tensor:
        values: Tensor = self.values(features)[:, 0]
        return values


def _mlp(inputs: int, hidden: Sequence[int], outputs: int, *, gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [_linear(inputs, width, math.sqrt(2.0)), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, _linear(inputs, outputs, gain))


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
