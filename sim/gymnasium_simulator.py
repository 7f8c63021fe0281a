"""One plain environment of Gymnasium, none of which resets by itself, as a simulator of one episode at a time."""

from collections.abc import Mapping
from copy import copy
from importlib import import_module
from numbers import Real
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sim.errors import MissingDependency, SimError
from sim.slots import Observation, Outcome
from sim.spaces import ArraySpace, ObservationSpace, Space, TextSpace

AUTORESET = gymnasium.wrappers.Autoreset.wrapper_spec().name
SUCCESS_KEYS = ("success", "is_success")  # the keys of info that simulators use


class GymnasiumSimulator:
    """Plays in one environment, which does not reset by itself."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self.observation_space: ObservationSpace = _named_spaces(self._env.observation_space)
        self.action_space = _action_space(self._env.action_space)

    def reset(self, seed: int) -> Observation:
        """Start an episode."""
        observation, _ = self._env.reset(seed=seed)
        return self._named(observation)

    def step(self, action: NDArray[Any]) -> Outcome:
        """Take one step."""
        discrete = self.action_space.num_choices is not None
        observation, reward, terminated, truncated, info = self._env.step(
            int(action) if discrete else action
        )
        success = next((bool(info[key]) for key in SUCCESS_KEYS if key in info), None)
        return Outcome(
            observation=self._named(observation),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            success=success,
            info={
                key: float(value)
                for key, value in info.items()
                if key not in SUCCESS_KEYS
                and isinstance(value, Real | np.number | np.bool_)
                and np.isfinite(float(value))
            },
        )

    def render(self) -> NDArray[np.uint8]:
        """A picture. SimError: the environment was made without."""
        if self._env.render_mode != "rgb_array":
            raise SimError(
                "this environment was made without pictures: set render = true in [env.args]"
            )
        return np.array(self._env.render(), dtype=np.uint8)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _named(self, observation: Any) -> Observation:
        named = {}
        for name, part in _parts(observation):
            space = self.observation_space[name]
            named[name] = (
                np.array(part, dtype=space.dtype) if isinstance(space, ArraySpace) else str(part)
            )
        return named


def open_environment(id: str, options: Mapping[str, Any]) -> Any:
    """gymnasium.make without its checks, and without a wrapper that would reset by itself.

    SimError: there is no such environment. MissingDependency: its package, or one that it needs, is not installed.
    """
    module, _, name = id.rpartition(":")
    try:
        if module:
            import_module(module)
        spec = copy(gymnasium.spec(name))
        spec.additional_wrappers = tuple(
            wrapper for wrapper in spec.additional_wrappers if wrapper.name != AUTORESET
        )
        return gymnasium.make(spec, disable_env_checker=True, **options)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f'environment "{id}": the module {error.name} is not installed where env actors run'
        ) from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingDependency(f'environment "{id}": {error}') from error
    except gymnasium.error.Error as error:
        way_out = "" if module else f'; one of another package is "module:{id}"'
        raise SimError(f'environment "{id}": {error}{way_out}') from error


def _named_spaces(space: Any) -> dict[str, Space]:
    return {name: _space(part) for name, part in _parts(space)}


def _parts(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """The leaves of nested dicts and tuples, of spaces or of values, by name."""
    if isinstance(tree, spaces.Dict | Mapping):
        pairs = [(str(key), tree[key]) for key in tree]
    elif isinstance(tree, spaces.Tuple | tuple):
        pairs = [(str(index), part) for index, part in enumerate(tree)]
    else:
        return [(name or "state", tree)]
    return [leaf for key, part in pairs for leaf in _parts(part, f"{name}/{key}" if name else key)]


def _space(space: Any) -> Space:
    return TextSpace() if isinstance(space, spaces.Text) else _action_space(space)


def _action_space(space: Any) -> ArraySpace:
    match space:
        case spaces.Box():
            return ArraySpace(
                shape=tuple(space.shape),
                dtype=str(space.dtype),
                low=_bound(space.low),
                high=_bound(space.high),
            )
        case spaces.Discrete():
            low = int(space.start)
            return ArraySpace(shape=(), dtype="int64", low=low, high=low + int(space.n) - 1)
        case spaces.MultiDiscrete():
            first, last = space.start, space.start + space.nvec - 1
            return ArraySpace(shape=tuple(space.shape), dtype="int64", low=first, high=last)
        case spaces.MultiBinary():
            return ArraySpace(shape=tuple(space.shape), dtype="int8", low=0, high=1)
    raise SimError(
        f"{space}: spaces of Box, Discrete, MultiDiscrete and MultiBinary are arrays, this one is not; wrap the "
        "environment in one whose spaces are"
    )


def _bound(bound: NDArray[Any]) -> float | NDArray[Any]:
    """One number where all are equal."""
    flat = np.unique(bound)
    return float(flat[0]) if flat.size == 1 else np.array(bound)
