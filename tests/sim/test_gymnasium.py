"""Any registered environment through the contract."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")

from sim.checker import check  # noqa: E402
from sim.errors import MissingDependency, SimError  # noqa: E402
from sim.gymnasium import Gymnasium  # noqa: E402
from sim.spaces import ArraySpace, TextSpace  # noqa: E402


class Corridor(gymnasium.Env[Any, Any]):
    """Walk to the end of a corridor; observations of every kind, success under a key that may be chosen."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Dict(
        {
            "goal": gymnasium.spaces.Dict({"at": gymnasium.spaces.Box(0, 20, (1,), np.float64)}),
            "pair": gymnasium.spaces.Tuple(
                (gymnasium.spaces.Discrete(21), gymnasium.spaces.MultiBinary(2))
            ),
            "instruction": gymnasium.spaces.Text(20),
        }
    )
    action_space = gymnasium.spaces.Discrete(2, start=1)

    def __init__(self, render_mode: str | None = None, key: str = "is_success") -> None:
        self.render_mode = render_mode
        self.key = key
        self.goal = np.zeros(1)
        self.bits = np.zeros(2, dtype=np.int8)
        self.place = 0
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.goal[:] = self.np_random.integers(3, 20)
        self.place = 0
        self.resets += 1
        return self.observe(), {}

    def observe(self) -> Any:
        self.bits[:] = self.place % 2, 1
        return {
            "goal": {"at": self.goal},
            "pair": (self.place, self.bits),
            "instruction": "walk",
        }

    def step(self, action: Any) -> Any:
        assert isinstance(action, int)
        self.place = min(20, self.place + action)
        there = bool(self.place >= self.goal[0])
        info = {self.key: np.bool_(there), "place": np.int64(self.place), "why": "x", "nan": np.nan}
        return self.observe(), np.float32(-1), there, False, info

    def render(self) -> Any:
        return np.full((8, 8, 3), self.place, dtype=np.uint8)


@pytest.fixture(autouse=True)
def corridor() -> Iterator[None]:
    gymnasium.register(
        "Corridor-v0",
        Corridor,
        max_episode_steps=10,
        additional_wrappers=(gymnasium.wrappers.Autoreset.wrapper_spec(),),
    )
    yield
    gymnasium.registry.pop("Corridor-v0")


@pytest.mark.parametrize(
    "options",
    [
        {"id": "CartPole-v1", "max_steps": 12},
        {"id": "Pendulum-v1", "max_steps": 5},
        {"id": "Corridor-v0", "max_steps": 5},
        {"id": "Corridor-v0", "max_steps": 5, "ignore_terminations": True},
        {"id": "Corridor-v0", "render": True},
    ],
)
def test_registered_environments_keep_the_contract(options: dict[str, Any]) -> None:
    """Whatever they do about resetting themselves; the last observation of a truncation is the true one."""
    uncut = options | {"max_steps": options.get("max_steps", 10) + 5}
    checked = check(partial(Gymnasium, **options), uncut=partial(Gymnasium, **uncut), max_steps=15)
    assert checked.ended == checked.episodes


def test_an_end_at_the_registered_limit_that_is_ignored_is_a_truncation() -> None:
    """Else an episode that is solved at its last step, and stays so, would never end."""
    env = Gymnasium(1, "Corridor-v0", ignore_terminations=True)
    env.reset([0], [3])
    results = [env.step([0], [np.int64(2)])[0] for _ in range(10)]
    assert results[-1].info["success_at_end"] == 1.0
    assert [result.truncated for result in results] == [False] * 9 + [True]
    assert not any(result.terminated for result in results)


def test_parts_of_an_observation_have_names() -> None:
    """Nested ones are joined; dtypes are those of the spaces; texts stay texts."""
    env = Gymnasium(1, "Corridor-v0")
    assert env.observation_space == {
        "goal/at": ArraySpace(shape=(1,), dtype="float64", low=0.0, high=20.0),
        "pair/0": ArraySpace(shape=(), dtype="int64", low=0, high=20),
        "pair/1": ArraySpace(shape=(2,), dtype="int8", low=0, high=1),
        "instruction": TextSpace(),
    }
    assert env.action_space == ArraySpace(shape=(), dtype="int64", low=1, high=2)
    env.reset([0], [3])
    (result,) = env.step([0], [np.int64(2)])
    assert {name: np.asarray(part).tolist() for name, part in result.observation.items()} == {
        "goal/at": result.observation["goal/at"].tolist(),
        "pair/0": 2,
        "pair/1": [0, 1],
        "instruction": "walk",
    }


@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_has_two_definitions(key: str) -> None:
    """Under either of the keys that simulators use; finite numbers of info are handed on."""
    env = Gymnasium(1, "Corridor-v0", kwargs={"key": key}, max_steps=10, ignore_terminations=True)
    env.reset([0], [3])
    infos = [env.step([0], [np.int64(2)])[0].info for _ in range(10)]
    assert infos[0] == {"success_once": 0.0, "success_at_end": 0.0, "place": 2.0}
    assert infos[-1] == {"success_once": 1.0, "success_at_end": 1.0, "place": 20.0}


def test_pictures_are_asked_for() -> None:
    """Without render = true the sentence says so."""
    env = Gymnasium(1, "Corridor-v0", render=True)
    env.reset([0], [3])
    assert env.render([0])[0].shape == (8, 8, 3)
    env = Gymnasium(1, "Corridor-v0")
    with pytest.raises(SimError, match="slot 0 was never reset"):
        env.render([0])
    env.reset([0], [3])
    with pytest.raises(SimError, match="set render = true"):
        env.render([0])


@pytest.mark.parametrize(
    ("id", "error", "message"),
    [
        ("Corridor-v7", SimError, "Corridor-v7"),
        ("NoSuchThing-v0", SimError, 'one of another package is "module:NoSuchThing-v0"'),
        (
            "no_such_module:Thing-v0",
            MissingDependency,
            "the module no_such_module is not installed",
        ),
        ("Blackjack-v1", None, ""),
    ],
)
def test_what_is_not_there_is_told(id: str, error: type[Exception] | None, message: str) -> None:
    """An unknown id, an unknown package; observations that are tuples of choices are fine."""
    if error is None:
        assert list(Gymnasium(1, id).observation_space) == ["0", "1", "2"]
        return
    with pytest.raises(error, match=message):
        Gymnasium(1, id)


def test_spaces_that_are_no_arrays_are_refused() -> None:
    """With the kinds that are."""
    gymnasium.register("Graph-v0", GraphCorridor)
    try:
        with pytest.raises(
            SimError, match="Box, Discrete, MultiDiscrete and MultiBinary are arrays"
        ):
            Gymnasium(1, "Graph-v0")
    finally:
        gymnasium.registry.pop("Graph-v0")


class GraphCorridor(Corridor):
    action_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(2))
