"""What an evaluation asks for, and what its answers say."""

from typing import Any

import pytest

from actors.conductor.config import EvalConfig, evaluation_env
from actors.conductor.evaluation import metrics_of, score_of, summary, tickets
from actors.env.config import EnvConfig
from actors.env.evaluating import evaluation_seed
from actors.randomness import fold
from actors.rollout.config import RolloutConfig
from sim.contract import split_counted_seed


def answer(problem: int, mode: str, rewards: list[float], **info: Any) -> dict[str, Any]:
    return {
        "problem": problem,
        "mode": mode,
        "rewards": rewards,
        "infos": [{"correct": reward, **info} for reward in rewards],
        "tokens": [10] * len(rewards),
        "lines": [],
        "video": b"",
    }


def test_tickets_of_every_problem_in_both_modes() -> None:
    """k at the temperature, one of the likeliest tokens; the first problems are recorded."""
    config = EvalConfig(problems=3, k=4, record=1, temperature=0.6)
    made = tickets(config, RolloutConfig(top_k=5), version=7, run_attempt=2)
    assert [(t["problem"], t["mode"], t["size"]) for t in made] == [
        (problem, mode, size)
        for problem in range(3)
        for mode, size in (("sampled", 4), ("greedy", 1))
    ]
    assert {(t["temperature"], t["top_k"]) for t in made} == {(0.6, 5), (0.0, 0)}
    assert {(t["version"], t["run_attempt"]) for t in made} == {(7, 2)}
    assert [t["record"] for t in made] == [True, True, False, False, False, False]
    greedy = tickets(EvalConfig(problems=2, k=0), RolloutConfig(), version=0, run_attempt=0)
    assert [t["mode"] for t in greedy] == ["greedy", "greedy"]
    (sampled,) = tickets(
        EvalConfig(problems=1, greedy=False), RolloutConfig(), version=0, run_attempt=0
    )
    assert sampled["temperature"] == RolloutConfig().temperature


def test_summary_by_hand() -> None:
    """Two problems, four samples each: one solved once, one solved twice."""
    answers = [
        answer(1, "greedy", [1.0]),
        answer(1, "sampled", [1.0, 1.0, 0.0, 0.0]),
        answer(0, "sampled", [0.0, 0.0, 1.0, 0.0]),
        answer(0, "greedy", [0.0]),
    ]
    config = EvalConfig(problems=2, k=4)
    result = summary(config, answers)
    assert result["rewards"] == {
        "sampled": [[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]],
        "greedy": [[0.0], [1.0]],
    }
    line = metrics_of(result)
    assert line["eval_problems"] == 2
    assert line["eval_reward_mean"] == 0.375
    # 1/4 and 1/2; 1 - 3/6 and 1 - 1/6; both solved within four
    assert [line[f"eval_pass_at_{k}"] for k in (1, 2, 4)] == [0.375, 0.666667, 1.0]
    assert line["eval_greedy"] == 0.5
    assert line["eval_info_correct"] == 0.375
    assert line["eval_reward_low"] < 0.375 < line["eval_reward_high"]
    assert line["eval_greedy_low"] < 0.5 < line["eval_greedy_high"]
    assert score_of(line) == 0.375


def test_greedy_alone_has_its_own_numbers() -> None:
    """k = 0: no mean@k, and the score is the greedy one."""
    result = summary(EvalConfig(problems=1, k=0), [answer(0, "greedy", [0.25])])
    line = metrics_of(result)
    assert "eval_reward_mean" not in line
    assert (line["eval_greedy"], score_of(line)) == (0.25, 0.25)
    assert line["eval_greedy_low"] is None


def test_success_is_a_threshold_or_a_number_of_the_task() -> None:
    """Rewards beyond 0 and 1, and robots that say success_once."""
    answers = [answer(0, "sampled", [0.4, 1.5], success_once=1.0), answer(1, "sampled", [0.4, 0.4])]
    reached = summary(EvalConfig(k=2, greedy=False, success_at=1.5), answers)
    assert reached["sampled"]["pass_at"] == {"1": 0.25, "2": 0.5}
    config = EvalConfig(k=2, greedy=False, success="success_once")
    assert summary(config, answers[:1])["sampled"]["pass_at"] == {"1": 1.0, "2": 1.0}
    with pytest.raises(
        ValueError, match=r'success = "success_once" is no number .*: it says correct'
    ):
        summary(config, answers)


def test_parts_by_a_text_of_the_task() -> None:
    """A row for each source."""
    answers = [
        answer(0, "sampled", [1.0], source="easy"),
        answer(1, "sampled", [0.0], source="hard"),
        answer(2, "sampled", [1.0], source="easy"),
    ]
    line = metrics_of(summary(EvalConfig(greedy=False, by="source"), answers))
    assert line["eval_easy_reward_mean"] == 1.0
    assert line["eval_hard_reward_mean"] == 0.0
    assert line["eval_reward_mean"] == pytest.approx(2 / 3, abs=1e-6)


def test_seeds_are_fixed_and_never_those_of_training() -> None:
    """A function of [eval] seed and problem; training's have another purpose in their key."""
    seeds = [evaluation_seed(0, problem, counted=False) for problem in range(1000)]
    assert seeds == [evaluation_seed(0, problem, counted=False) for problem in range(1000)]
    assert len(set(seeds)) == 1000
    assert not set(seeds) & {fold(0, 1, group) >> 1 for group in range(1000)}
    assert not set(seeds) & {evaluation_seed(1, problem, counted=False) for problem in range(1000)}
    counted = [
        split_counted_seed(evaluation_seed(0, problem, counted=True)) for problem in range(9)
    ]
    assert [index for _, index in counted] == list(range(9))
    assert len({key for key, _ in counted}) == 1


def test_the_tasks_own_arguments_with_its_eval_split() -> None:
    """What [eval.args] say goes first; another task takes nothing over."""
    env = EnvConfig(task="text", args={"eval_share": 0.1, "template": "{question}"})
    assert evaluation_env(env, EvalConfig()) == (
        "text",
        {"eval_share": 0.1, "template": "{question}", "split": "eval"},
    )
    assert evaluation_env(env, EvalConfig(args={"split": "all"}))[1]["split"] == "all"
    sums = EnvConfig(task="arithmetic", args={"max_digits": 4})
    assert evaluation_env(sums, EvalConfig(args={"max_digits": 5})) == (
        "arithmetic",
        {"max_digits": 5},
    )
    assert evaluation_env(env, EvalConfig(task="arithmetic")) == ("arithmetic", {})


def test_success_has_wilsons_interval_where_every_episode_says_it() -> None:
    """3 of 4, by hand: (0.75 + z²/8 ± z sqrt(0.1875 / 4 + z²/64)) / (1 + z²/4), z = 1.96."""
    said = [1.0, 1.0, 0.0, 1.0]
    answers = [answer(n, "greedy", [5.0], success_once=once) for n, once in enumerate(said)]
    config = EvalConfig(problems=4, k=0)
    (found,) = (summary(config, answers)["greedy"]["success"],)
    assert list(found) == ["success_once"]
    assert found["success_once"]["rate"] == 0.75
    assert (found["success_once"]["low"], found["success_once"]["high"]) == pytest.approx(
        (0.30064, 0.95441), abs=1e-4
    )
    line = metrics_of(summary(config, answers))
    assert line["eval_info_success_once"] == 0.75
    assert line["eval_info_success_once_low"] == found["success_once"]["low"]
    unsaid = [*answers, answer(4, "greedy", [5.0])]
    assert summary(EvalConfig(problems=5, k=0), unsaid)["greedy"]["success"] == {}


def test_the_first_problems_are_filmed_with_an_environment_that_draws() -> None:
    """A task that has to be told to render is."""
    made = tickets(EvalConfig(problems=3, k=0, videos=1), RolloutConfig(), version=0, run_attempt=0)
    assert [ticket["filmed"] for ticket in made] == [True, False, False]
    env = EnvConfig(task="gymnasium", args={"id": "CartPole-v1"})
    assert evaluation_env(env, EvalConfig(videos=1))[1] == {"id": "CartPole-v1", "render": True}
    assert evaluation_env(env, EvalConfig())[1] == {"id": "CartPole-v1"}
