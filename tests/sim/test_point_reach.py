"""A point that reaches a goal: physics worked by hand, rewards, ends, pictures."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from sim.checker import check
from sim.chunks import Chunked
from sim.point_reach import BACKGROUND, GOAL, POINT, PointReach


def towards_goal(observation: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The action of a policy that knows the way."""
    point, goal = observation["state"][:2], observation["state"][2:]
    return np.clip((goal - point) / 0.1, -1.0, 1.0).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": 16}, {"reward": "sparse", "ignore_terminations": True}],
)
def test_it_keeps_the_contract(options: dict[str, Any]) -> None:
    """With and without pictures; all episodes end within the steps given."""
    make = partial(PointReach, max_steps=10, **options)
    checked = check(make, uncut=partial(PointReach, max_steps=20, **options))
    assert checked.ended == checked.episodes


def test_a_policy_that_knows_the_way_succeeds() -> None:
    """Every goal is reached within the table's diagonal; the episode ends there."""
    env = PointReach(64)
    slots = list(range(64))
    playing = dict(zip(slots, env.reset(slots, slots), strict=True))
    ended = {}
    while playing:
        results = env.step(list(playing), [towards_goal(each) for each in playing.values()])
        of_slot = dict(zip(list(playing), results, strict=True))
        ended |= {slot: r for slot, r in of_slot.items() if r.terminated or r.truncated}
        playing = {s: r.observation for s, r in of_slot.items() if s not in ended}
    assert all(result.terminated for result in ended.values())
    success = {"success_once": 1.0, "success_at_end": 1.0}
    assert all(result.info == success for result in ended.values())


def test_rewards_and_both_successes_by_hand() -> None:
    """Dense: minus the distance. Sparse: 1 while there. success_once stays when the point leaves again."""
    dense, sparse = (
        PointReach(1, 60, reward=r, ignore_terminations=True) for r in ("dense", "sparse")
    )
    (observation,) = dense.reset([0], [7])
    sparse.reset([0], [7])
    seen = []
    for step in range(60):
        move = towards_goal(observation) if step < 30 else np.ones(2, dtype=np.float32)
        (one,), (other,) = dense.step([0], [move]), sparse.step([0], [move])
        observation = one.observation
        distance = float(np.linalg.norm(observation["state"][:2] - observation["state"][2:]))
        assert one.reward == pytest.approx(-distance, abs=1e-6)
        assert other.reward == float(distance <= 0.1) == one.info["success_at_end"]
        seen.append((one.info["success_once"], one.info["success_at_end"]))
        assert one.truncated == (step == 59)
    assert seen[0] == (0.0, 0.0)
    assert (1.0, 1.0) in seen
    assert seen[-1] == (1.0, 0.0)  # it was moved into the corner


def test_the_edge_holds_the_point() -> None:
    """Actions beyond the fastest count as the fastest."""
    env = PointReach(1, 50, ignore_terminations=True)
    env.reset([0], [1])
    for _ in range(25):
        (result,) = env.step([0], [np.array([5.0, -5.0], dtype=np.float32)])
    np.testing.assert_array_equal(result.observation["state"][:2], [1.0, -1.0])


def test_pictures_show_point_and_goal() -> None:
    """The discs lie where the state says; beside a picture the state has no goal."""
    states = PointReach(1).reset([0], [5])[0]["state"]
    env = PointReach(1, image_size=32)
    (observation,) = env.reset([0], [5])
    np.testing.assert_array_equal(observation["state"], states[:2])
    for picture in (observation["image"], *env.render([0])):
        size = len(picture)
        for (x, y), colour in ((states[:2], POINT), (states[2:], GOAL)):
            row, column = int((1 - y) / 2 * size), int((1 + x) / 2 * size)
            np.testing.assert_array_equal(picture[row, column], colour)
        assert (picture == BACKGROUND).all(axis=2).mean() > 0.95


def test_a_chunk_is_its_steps() -> None:
    """Rewards come back per step; the last observation and the ends are those of the last step run."""
    single, chunked = PointReach(2, 5), Chunked(PointReach(2, 5))
    single.reset([0, 1], [3, 4])
    chunked.reset([0, 1], [3, 4])
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 2)).astype(np.float32)
    steps = [single.step([1], [action])[0] for action in actions[:5]]
    first, second = chunked.step([1, 0], [actions[:3], actions[:1]])
    assert first.step_rewards is not None
    assert second.step_rewards is not None
    assert first.step_rewards.tolist() == pytest.approx([step.reward for step in steps[:3]])
    assert first.reward == pytest.approx(sum(step.reward for step in steps[:3]))
    assert (len(second.step_rewards), first.truncated, second.truncated) == (1, False, False)
    np.testing.assert_array_equal(first.observation["state"], steps[2].observation["state"])
    (cut,) = chunked.step([1], [actions[3:]])  # five steps asked, two left
    assert cut.truncated
    assert cut.step_rewards is not None
    assert cut.step_rewards.tolist() == pytest.approx([step.reward for step in steps[3:]])


def test_chunks_keep_the_contract_too() -> None:
    """Chunks of changing length, in the same checks as single steps."""
    draw = np.random.default_rng(0)

    def chunk(observation: Any) -> Any:
        return draw.uniform(-1, 1, (int(draw.integers(1, 5)), 2)).astype(np.float32)

    checked = check(lambda num_slots: Chunked(PointReach(num_slots, 7)), actions=chunk)
    assert checked.ended == checked.episodes


def test_what_is_no_chunk_is_refused() -> None:
    """Before anything is stepped."""
    env = Chunked(PointReach(1))
    env.reset([0], [0])
    for wrong in (np.zeros(2), np.zeros((0, 2)), np.zeros((3, 4))):
        with pytest.raises(
            ValueError, match=r"slot 0: an action of shape .* a chunk is \[steps, 2\]"
        ):
            env.step([0], [wrong])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps = 0"),
        ({"reward": "dence"}, '"dence": it is "dense" or "sparse"'),
        ({"image_size": -1}, "image_size = -1"),
    ],
)
def test_wrong_arguments_say_the_rule(options: dict[str, Any], message: str) -> None:
    """As every task does."""
    with pytest.raises(ValueError, match=message):
        PointReach(1, **options)
