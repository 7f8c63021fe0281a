"""The arithmetic of bench.versus_trl, and what both sides are given; what it measures is for a quiet machine."""

import pytest

from actors.trainer.warmup import cache_key
from bench.local import CONFIG
from bench.trl_peer import TaskReward, arguments, group_seeds, prompts
from bench.versus_trl import changes, overrides, reached, samples_per_s, seconds_to, summarize
from flowd.job import load_job
from sim.registry import make


def steps_of(rewards: list[float], seconds: float) -> list[dict[str, float]]:
    """Updates that take so long each."""
    return [
        {"reward_mean": reward, "seconds": seconds * (place + 1)}
        for place, reward in enumerate(rewards)
    ]


def test_samples_count_after_the_warm_in():
    """A slow first update changes nothing."""
    steps = steps_of([0.5] * 10, 0.5)
    steps[0]["seconds"] = 0.1
    assert samples_per_s(steps, samples=256) == pytest.approx(512.0)


def test_the_goal_is_reached_where_a_whole_window_has_it():
    """Five updates of 0.9 end with the seventh."""
    assert seconds_to(steps_of([0.2, 0.5, *[0.9] * 6], 2.0), 0.9) == 14.0
    assert seconds_to(steps_of([0.2] * 8, 2.0), 0.9) is None


@pytest.mark.parametrize(
    ("ours", "trl_rewards", "expected"),
    [(1.0, [0.9] * 20, True), (1.1, [0.9] * 20, False), (1.0, [0.5] * 20, False)],
    ids=["both bars", "too slow", "TRL never gets there"],
)
def test_both_bars_count(ours, trl_rewards, expected):
    """Twice TRL's samples per second, half of its seconds to 0.9."""
    result = summarize(
        [steps_of([0.9] * 20, ours)] * 3, [steps_of(trl_rewards, 2.0)] * 3, samples=256
    )
    assert result["reward_final"] == pytest.approx(0.9)
    assert reached(result) is expected


def test_a_seed_that_misses_the_goal_is_not_left_out_of_the_median():
    """Then there is no number."""
    good, bad = steps_of([0.9] * 20, 1.0), steps_of([0.5] * 20, 1.0)
    result = summarize([good, good, bad], [good] * 3, samples=256)
    assert result["seconds_to_0_9"] is None
    assert result["seconds_to_0_9_by_seed"] == [5.0, 5.0, None]


def test_both_begin_with_the_same_model():
    """The changes for a run leave the warm-up as it is, so that flowd's job finds it in the cache."""
    plain = load_job(CONFIG, ["job.seed=1"])
    changed = load_job(CONFIG, overrides(changes(1, 50, 2)))
    task = make(plain.env.task, num_slots=1, args=plain.env.args)
    assert cache_key(plain, task) == cache_key(changed, task)


def test_trl_gets_the_jobs_prompts_and_the_tasks_reward():
    """The conversation of each group, and the task's judgement of the answers to it."""
    config = load_job(CONFIG)
    rows = prompts(config, group_seeds(0, 3))
    task = make(config.env.task, num_slots=1, args=config.env.args)
    answers = [answer for _, answer in task.examples([row["seed"] for row in rows])]
    assert len({row["prompt"][0]["content"] for row in rows}) == 3
    answers[1] = "wrong"
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    rewards = TaskReward(config)(completions=completions, seed=[row["seed"] for row in rows])
    assert rewards == [1.0, 0.0, 1.0]


def test_what_cannot_be_translated_is_refused():
    """Another loss would compare two algorithms."""
    with pytest.raises(ValueError, match="only grpo"):
        arguments(load_job(CONFIG, ["algorithm.name=rloo"]), 10, "folder")
    assert arguments(load_job(CONFIG), 10, "folder")["per_device_train_batch_size"] == 256
