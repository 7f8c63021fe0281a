"""A job on prompts from a file, with several rewards, one of which has a sandbox: real processes."""

import json
from pathlib import Path

from flowd_process import FAST, Flowd, lines_of

STEPS, GROUPS = 3, 8  # of fast.toml
ROWS = [
    {"q": f"{n}+{n}=", "a": str(2 * n), "tests": ["assert True"]} for n in range(STEPS * GROUPS)
]


def test_every_row_is_played_once_an_epoch_and_every_reward_logged(
    flowd: Flowd, tmp_path: Path
) -> None:
    """Whichever of the two env actors plays a group; the mean of each reward is in metrics.jsonl."""
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = '{question = "q", answer = "a", tests = "tests"}'
    rewards = (
        '[{function = "exact"}, {function = "matches", name = "short", weight = 0.5, args = {pattern = "^.{0,2}$"}}, '
        '{function = "python_tests", weight = 0.0, args = {allow_unprotected = true}}]'
    )
    args = f'{{sources = [{{path = "{path}", fields = {fields}}}], rewards = {rewards}}}'
    changes = ("job.name=text", f"job.steps={STEPS}", "env.task=text", f"env.args={args}")
    changes += (f"metrics.samples_per_step={GROUPS}",)
    words = [word for change in changes for word in ("--set", change)]
    done = flowd.ctl("submit", str(FAST), "--follow", *words)
    assert done.returncode == 0, done.stderr
    lines = flowd.steps("text")
    assert len(lines) == STEPS
    for line in lines:
        expected = line["info_exact"] + 0.5 * line["info_short"]
        assert abs(line["reward_mean"] - expected) < 1e-5
        assert line["info_python_tests"] == 0.0
    samples = list(lines_of(flowd.run("text").samples))
    played = sorted(sample["info"]["row"] for sample in samples)
    assert played == sorted(f"{path}, line {n}" for n in range(1, len(ROWS) + 1))
    for sample in samples:
        number = int(sample["info"]["row"].rpartition(" ")[2])
        assert sample["prompt"] == ROWS[number - 1]["q"]
        assert sample["info"]["python_tests_reason"] == "no program"
    flowd.audit("text")
