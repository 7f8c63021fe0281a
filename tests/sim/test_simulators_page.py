"""The page about simulators: its example is a task, and its check passes."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.registry import TASKS, make

PAGE = Path(__file__).parents[2] / "docs" / "simulators.md"


def blocks() -> list[str]:
    """The page's Python blocks that are programs."""
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [block for block in found if "import" in block]


def test_the_example_is_a_task_and_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would: the file, the check, the name in a job."""
    example, check = blocks()
    assert len(example.splitlines()) < 60
    (tmp_path / "thermostat.py").write_text(example)
    (tmp_path / "check.py").write_text(check)
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ended=24" in done.stdout, done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    env = make("thermostat:Thermostat", num_slots=1, args={"outside": 0.0})
    env.reset([0], [3])
    full = np.ones(1, dtype=np.float32)
    successes = [env.step([0], [full])[0].info["success_once"] for _ in range(30)]
    assert successes[0] == 0.0
    assert successes[-1] == 1.0


def test_every_simulator_is_on_the_page() -> None:
    """Text tasks have a page of their own."""
    text = PAGE.read_text()
    for task, path in TASKS.items():
        assert f"`{task}`" in text or path.startswith("sim.text."), task
