"""What bench.algorithms keeps of runs, makes of them, and writes; what it measures is for a quiet machine."""

import json
from typing import Any

import pytest

from bench.algorithm_contrasts import CONTRASTS, NoiseContrast, explained, noise_scale, rollout_idle
from bench.algorithm_figures import curve, mean_curve, reaches, summary
from bench.algorithm_report import (
    BEGIN,
    END,
    MISSING,
    PANELS,
    PICTURE,
    section,
    with_section,
    write,
)
from bench.algorithm_runs import (
    CONFIGS,
    NOISE_BATCHES,
    REPEATED,
    VARIANTS,
    Record,
    Results,
    Run,
    numbers,
    planned,
)

NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))


def a_record(rewards: list[float], label: str = "grpo", seed: int = 0, **more: Any) -> Record:
    """Steps of two seconds and 32 groups, the first of which began at time 100."""
    algorithm, _, variant = label.partition("/")
    steps = [
        {
            "step": step,
            "time": 102.0 + 2 * step,
            "seconds": 2.0,
            "reward_mean": reward,
            "groups": 32,
            "tokens": 1000,
            "grad_norm": 1.0,
            "useful_share": 0.5,
            "clip_fraction": 0.0,
            **{key: values[step] for key, values in more.items()},
        }
        for step, reward in enumerate(rewards)
    ]
    return Record(
        label=label,
        seed=seed,
        key=Run(algorithm, seed, variant).key(),
        reason="",
        seconds=2.0 * len(rewards),
        steps=steps,
        group_size=8,
        load={},
        surroundings={"hardware": {"cpu": "a CPU", "cores": 2}, "versions": {"torch": "2.13"}},
    )


def test_five_algorithms_have_three_seeds_and_the_others_one():
    """First seeds come first, so that a run that is stopped has some of everything; variants come last."""
    runs = planned(NAMES, None, variants=False)
    assert len(runs) == len(NAMES) + 2 * len(REPEATED)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    everything = planned(NAMES, None)
    assert len(everything) == len(runs) + len(VARIANTS)
    assert len({run.key() for run in everything}) == len(everything)


def test_seeds_and_names_can_be_chosen():
    """A variant belongs to its algorithm."""
    assert planned(["rloo"], 2, variants=False) == [Run("rloo", 0), Run("rloo", 1)]
    assert [run.algorithm for run in planned(["rloo"], 1)] == ["rloo"] * 3


def test_a_finished_run_is_found_again_and_a_changed_job_is_not(tmp_path, monkeypatch):
    """What counts is the resolved job with its seed, not comments."""
    (tmp_path / "configs").mkdir()
    text = (CONFIGS / "grpo.toml").read_text()
    job = tmp_path / "configs" / "grpo.toml"
    job.write_text(text)
    monkeypatch.setattr("bench.algorithm_runs.CONFIGS", job.parent)
    record = a_record([0.5] * 5)
    Results(tmp_path / "results.jsonl").add(record)
    results = Results(tmp_path / "results.jsonl")
    job.write_text("# another comment\n" + text)
    assert results.find(Run("grpo")) == record
    assert results.find(Run("grpo", seed=1)) is None
    assert results.by_label() == {"grpo": [record]}
    job.write_text(text.replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    assert results.find(Run("grpo")) is None
    assert results.by_label() == {}


def test_a_line_that_was_cut_off_is_a_run_to_do_again(tmp_path):
    """And the next record begins a line of its own."""
    path = tmp_path / "results.jsonl"
    Results(path).add(a_record([0.5] * 5, seed=0))
    with path.open("a") as file:
        file.write('{"label": "grpo", "se')
    results = Results(path)
    assert results.find(Run("grpo", 1)) is None
    results.add(a_record([0.5] * 5, seed=1))
    again = Results(path)
    assert [record.seed for record in again.by_label()["grpo"]] == [0, 1]


def test_only_the_last_attempt_of_a_step_counts():
    """Lines of evaluations and what is not a number are left out."""
    lines = [
        {"step": 0, "reward_mean": 0.1, "group_ids": [1], "attempt": 0},
        {"step": 1, "reward_mean": 0.2, "attempt": 0},
        {"step": 1, "eval_reward_mean": 0.9},
        {"step": 1, "reward_mean": 0.3, "weights_variant": "full", "attempt": 1},
    ]
    assert numbers(lines) == [
        {"step": 0, "reward_mean": 0.1, "attempt": 0},
        {"step": 1, "reward_mean": 0.3, "attempt": 1},
    ]


def test_the_goal_is_reached_where_a_whole_window_has_it():
    """Five steps of 0.9 end at step 6; 32 groups and two seconds each. Groups that were filtered count too."""
    record = a_record([0.2, 0.5, *[0.9] * 6], groups_sampled=[64] + [32] * 7)
    row = summary(record)
    assert row["groups_to_goal"] == 64 + 6 * 32
    assert row["seconds_to_goal"] == 14.0
    assert row["reward"] == pytest.approx(0.9)
    assert row["tokens_per_s"] == 500.0
    assert reaches(curve(a_record([1.0] * 4))) is None


def test_the_noise_scale_is_found_from_two_batch_sizes():
    """With |G|² = 2 and tr Σ = 24, the squared norm of a mean over B groups is 2 + 24 / B on average."""
    small = a_record([0.3] * 4, grad_norm=[8**0.5] * 4)
    large = a_record([0.3] * 4, grad_norm=[(2 + 24 / 32) ** 0.5] * 4)
    small.steps[:] = [{**step, "groups": 4} for step in small.steps]
    assert noise_scale(small, large) == pytest.approx(12.0)


def test_a_critic_that_knows_the_mean_explains_nothing():
    """Its squared error is the variance of rewards of 0 and 1; the value loss is half of it."""
    record = a_record([0.4] * 10, value_loss=[0.12] * 9 + [0.03])
    assert explained(0.0, 0.1)(record) == pytest.approx(0.0)
    assert explained(0.9, 1.0)(record) == pytest.approx(0.75)


def test_rollout_is_idle_where_it_waits_for_requests():
    """Waiting over waiting and working."""
    record = a_record([0.4] * 2, rollout_wait_requests_s=[1.0, 0.0], rollout_work_s=[2.0, 1.0])
    assert rollout_idle(record) == 0.25


def test_a_seed_that_has_ended_keeps_its_last_value():
    """One curve rises to 1 over 10, the other stays at 0.5 and ends at 5."""
    grid, mean, low, high = mean_curve([[0.0, 10.0], [0.0, 5.0]], [[0.0, 1.0], [0.5, 0.5]], 3)
    assert grid == [0.0, 5.0, 10.0]
    assert mean == [0.25, 0.5, 0.75]
    assert low == [0.0, 0.5, 0.5]
    assert high == [0.5, 0.5, 1.0]


def test_what_was_not_run_is_said():
    """In every row, and no picture is shown that is not there."""
    text = section(NAMES, {})
    assert text.count(MISSING) == 4 * len(NAMES) + 2 * len(CONTRASTS)
    assert PICTURE not in text


def test_every_algorithm_is_drawn_and_has_a_contrast_whose_runs_are_planned():
    """A contrast about a run that nobody makes would be empty forever."""
    assert sorted(name for names in PANELS.values() for name in names) == NAMES
    assert {each.algorithm for each in CONTRASTS} == set(NAMES)
    labels = {run.label for run in planned(NAMES, None)}
    for each in CONTRASTS:
        ends = [f"-{b}" for b in NOISE_BATCHES] if isinstance(each, NoiseContrast) else [""]
        assert {label + end for label in (each.ours, each.other) for end in ends} <= labels


def test_the_page_is_rewritten_between_its_marks(tmp_path):
    """What stands around them stays; the picture is drawn beside the page."""
    page = tmp_path / "algorithms.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    found = {"grpo": [a_record([0.4, *[0.95] * 6], seed=seed) for seed in (0, 1)]}
    write(tmp_path, NAMES, found)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n![")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert (
        "| grpo | 2 | 0.95 (0.95 to 0.95) | 192 (192 to 192) | 12 (12 to 12) | 500 (500 to 500) |"
        in text
    )
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="lacks the lines"):
        with_section("no marks", "text")


def test_the_page_of_this_project_can_be_rewritten():
    """Its marks are there, and records are JSON."""
    with_section((CONFIGS.parents[1] / "docs" / "algorithms.md").read_text(), "text")
    json.dumps(a_record([0.5]).steps)
