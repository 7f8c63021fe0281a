"""Whole jobs of a policy that acts on arrays, inline and as processes."""

import json
from pathlib import Path

import pytest
from flowd_process import Flowd, lines_of

POINT = Path(__file__).with_name("point_ppo.toml")


def test_ppo_learns_to_reach_and_what_was_trained_was_sampled(flowd: Flowd) -> None:
    """The return rises; sampler and trainer agree on every action's log-prob."""
    done = flowd.ctl("submit", str(POINT), "--follow")
    assert done.returncode == 0, done.stderr
    lines = flowd.steps("point")
    returns = [line["reward_mean"] for line in lines]
    assert sum(returns[-3:]) / 3 > sum(returns[:3]) / 3 + 4, returns
    assert lines[-1]["info_success_once"] > lines[0]["info_success_once"]
    for line in lines:
        assert line["staleness_max"] == 0
        assert line["tokens"] <= 16 * 30
    flowd.audit("point")


def test_what_was_learnt_is_evaluated_and_begun_with(flowd: Flowd, tmp_path: Path) -> None:
    """A commit's export is a policy that another job starts from; `flowctl eval` plays fixed starts with it."""
    if not flowd.run("point").root.exists():
        assert flowd.ctl("submit", str(POINT), "--follow").returncode == 0
    words = ("eval", "point", "--episodes", "40", "--greedy", "--seed", "3")
    result = flowd.ctl_json(*words)
    found = result["greedy"]
    assert (result["of_step"], result["problems"]) == (12, 40)
    assert found["success"]["success_once"]["rate"] == found["info"]["success_once"]
    table = flowd.ctl(*words[:-2], "--inline")
    assert table.returncode == 0, table.stderr
    assert "success_at_end" in table.stdout
    assert "max_new_tokens" not in table.stderr
    folder = tmp_path / "policy"
    told = flowd.ctl_json("export", "point", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "policy.safetensors"]
    assert told["dtype"] == "float32"
    begun = ("job.name=begun", "job.steps=0", f"policy.path={folder}")
    evaluation = ("eval.problems=40", "eval.k=0", "eval.seed=3")
    changes = [word for change in (*begun, *evaluation) for word in ("--set", change)]
    done = flowd.ctl("submit", str(POINT), "--follow", *changes)
    assert done.returncode == 0, done.stderr
    (line,) = lines_of(flowd.run("begun").metrics)
    assert line["eval_greedy"] == pytest.approx(found["reward_mean"], rel=1e-3)
    refused = flowd.ctl("eval", "point", "--temperature", "0.5")
    assert refused.returncode == 2
    assert "samples from its own distribution" in refused.stderr


def test_chunks_and_lag_go_through_processes(flowd: Flowd) -> None:
    """Chunks that do not divide an episode, groups of several episodes, one version of lag, two rollout actors."""
    changes = (
        *("job.name=chunks", "job.steps=4", "job.max_staleness=1", "policy.chunk=4"),
        *("rollout.devices=2", "rollout.group_size=4", "job.groups_per_step=4"),
        *(
            "algorithm.name=grpo",
            "algorithm.mini_batches=1",
            "algorithm.epochs=1",
            "algorithm.ratio_level=chunk",
        ),
        *("env.actors=2", "env.args.ignore_terminations=true"),
    )
    words = [word for change in changes for word in ("--set", change)]
    done = flowd.ctl("submit", str(POINT), "--follow", *words)
    assert done.returncode == 0, done.stderr
    lines = flowd.steps("chunks")
    assert len(lines) == 4
    for line in lines:
        assert line["staleness_max"] <= 1
        assert line["tokens_trained"] == 4 * 4 * 30  # eight chunks of four, the last one cut to two
    samples = [json.loads(line) for line in flowd.run("chunks").samples.read_text().splitlines()]
    assert samples
    assert [len(s["chunk"]) for s in samples[:8]] == [4, 4, 4, 4, 4, 4, 4, 2]
    flowd.audit("chunks")
