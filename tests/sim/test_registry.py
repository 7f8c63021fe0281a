"""Tasks by name or import path, and what a wrong one is told."""

import subprocess
import sys

import pytest

from sim.errors import SimError
from sim.registry import TASKS, check_arguments, find, make
from sim.text.arithmetic import Arithmetic


def test_every_registered_task_is_there():
    """Names lead to classes."""
    assert {find(task).__name__ for task in TASKS} == {
        path.split(":")[1] for path in TASKS.values()
    }


def test_a_task_is_made_from_its_name_or_path():
    """With its keyword arguments."""
    for task in ("arithmetic", "sim.text.arithmetic:Arithmetic"):
        env = make(task, num_slots=2, args={"min_digits": 1, "max_digits": 2})
        assert isinstance(env, Arithmetic)
        assert len(env.reset([0, 1], [5, 6])) == 2


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("arithmetics", r'no task "arithmetics": did you mean "arithmetic"\?'),
        ("zzz", "known are arithmetic, gsm8k, guess_number"),
        ("no_such_module:Env", "no module no_such_module"),
        ("sim.text.arithmetic:Algebra", "module sim.text.arithmetic has no Algebra"),
    ],
)
def test_an_unknown_task_says_the_way_out(task: str, message: str):
    """A near name, the known ones, or what is missing of a path."""
    with pytest.raises(SimError, match=message):
        make(task, num_slots=1, args={})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_digit", r'takes no argument "max_digit": did you mean "max_digits"\?'),
        ("zzz", "it takes min_digits, max_digits"),
        ("num_slots", 'takes no argument "num_slots"'),
    ],
)
def test_a_wrong_argument_says_the_right_ones(name: str, message: str):
    """The number of slots is the env actor's to choose."""
    with pytest.raises(SimError, match=message):
        make("arithmetic", num_slots=1, args={name: 1})


def test_arguments_are_checked_without_opening_anything() -> None:
    """A missing one is named too; a task that takes any is not second-guessed."""
    check_arguments("gsm8k", {"path": "/nowhere.jsonl"})
    with pytest.raises(SimError, match=r'needs the argument "path"'):
        check_arguments("gsm8k", {"limit": 3})
    with pytest.raises(SimError, match=r'no argument "pat".*did you mean "path"'):
        check_arguments("gsm8k", {"pat": "x"})


def test_checking_a_job_loads_no_simulator() -> None:
    """The daemon may run where the simulators are not installed, or are in another interpreter."""
    code = (
        "import sys; from sim.registry import TASKS, find; [find(task) for task in TASKS]; "
        "sys.exit(bool({'gymnasium', 'torch', 'mani_skill', 'libero', 'metaworld'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
