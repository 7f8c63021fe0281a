"""The reward for programs: which block is taken, what tests are, and that hostile programs earn nothing."""

from collections.abc import Iterator
from typing import Any

import pytest

from sim.text.python_tests import PythonTests, extract
from sim.text.sandbox import SandboxError

ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\n"
ECHO = "```py\nprint(input() + '!  ')\n```"


@pytest.fixture(scope="module")
def reward() -> Iterator[PythonTests]:
    try:
        yield PythonTests(timeout_s=1.0, memory_mb=256, processes=8)
    except SandboxError as error:
        pytest.skip(str(error))


def earned(reward: PythonTests, reply: str, tests: Any) -> tuple[float, object]:
    score = reward(reply, {"tests": tests})
    return score.value, score.info["reason"]


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("```python\na\n```\nand\n```\nb\n```", "b\n"),
        ("```python\na\n```\n```json\n{}\n```", "a\n"),
        ("````python\n```\na\n````", "```\na\n"),
        ("~~~py\na\n~~~", "a\n"),
        ("```python title=x\na\n```  ", "a\n"),
        ("```python\nnever closed", None),
        ("print(1)", None),
    ],
)
def test_last_python_block_is_the_program(reply: str, program: str | None) -> None:
    """An unclosed one was cut off, and is none."""
    assert extract(reply) == program


def test_code_and_pairs(reward: PythonTests) -> None:
    """A text, a list of texts, a list of pairs; white space at the end of lines does not count."""
    assert earned(reward, ADD, "assert add(1, 2) == 3") == (1.0, "")
    assert earned(reward, ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"]) == (
        0.0,
        "AssertionError: ",
    )
    assert earned(reward, ECHO, [{"input": "a\n", "output": "a!\n"}]) == (1.0, "")
    assert earned(reward, ECHO, [{"input": "a\n", "output": "b!\n"}]) == (0.0, "wrong output")
    assert earned(reward, "I cannot.", ["assert True"]) == (0.0, "no program")


def test_share_of_tests() -> None:
    """With `partial`; `info` has it in any case."""
    try:
        reward = PythonTests(partial=True, memory_mb=256)
    except SandboxError as error:
        pytest.skip(str(error))
    score = reward(ADD, {"tests": ["assert add(1, 1) == 2", "assert 0", "assert add(2, 2) == 4"]})
    assert score.value == score.info["passed"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "x = bytearray(10 << 30)",
        "while True: print('x' * 100_000)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os; os.killpg(0, 9)",
        "def broken(:",
    ],
)
def test_hostile_programs_earn_nothing(reward: PythonTests, program: str) -> None:
    """Although no test would have failed."""
    value, reason = earned(reward, f"```python\n{program}\n```", ["assert True"])
    assert value == 0.0
    assert reason


@pytest.mark.parametrize(
    "tests", [None, [], 3, [{"input": "a"}], ["ok", {"input": 1, "output": 2}]]
)
def test_what_is_no_test_is_told(reward: PythonTests, tests: Any) -> None:
    """A row without tests must not pass, nor count as failed."""
    with pytest.raises(ValueError, match=r'"tests" must be code, a list of code, or'):
        reward(ADD, {"tests": tests})
