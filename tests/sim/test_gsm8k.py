"""The GSM8K task: its file, its problems by seed, and its grading over the whole test file."""

import json
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sim.checker import check
from sim.contract import ChatMessage
from sim.errors import BadTaskData, MissingDependency, SimError
from sim.text import gsm8k
from sim.text.gsm8k import Gsm8k, Problem, grade, load_problems

TEST_FILE = Path(__file__).parents[2] / "../shared/data/gsm8k/test.jsonl"

needs_test_file = pytest.mark.skipif(
    not TEST_FILE.exists(), reason="needs ../shared/data/gsm8k/test.jsonl beside the repository"
)

ROWS = [
    {
        "question": f"What is {n} + {n}?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n:,}",
    }
    for n in range(600, 608)
]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def right_ways(problem: Problem) -> dict[str, str]:
    """The reference written in usual ways."""
    plain, value = problem.answer, int(problem.value)
    commas = f"{value:,}"
    return {
        "as in the file": f"{problem.solution}\n#### {commas}",
        "marks": f"So it is {plain}.\n#### {plain}",
        "marks, dollar, full stop": f"#### ${commas}.",
        "marks, unit": f"#### {plain} apples",
        "boxed": rf"Thus \boxed{{{plain}}}",
        "boxed in math, full stop": rf"The final answer is $\boxed{{{commas}}}$.",
        "boxed, dollar": rf"\boxed{{\${commas}}}",
        "boxed, unit": rf"\boxed{{{plain}\text{{ dollars}}}}",
        "boxed, latex separators": rf"\boxed{{{commas.replace(',', '{,}')}}}",
        "boxed, decimal": rf"\[ \boxed{{{plain}.00}} \]",
        "answer is, full stop": f"The answer is {commas}.",
        "answer is, dollar": f"The answer is ${commas}.",
        "answer is, math": f"Therefore, the answer is ${plain}$.",
        "answer is, bold, unit": f"**Final Answer:** **{commas} dollars**",
        "answer is, decimal": f"the answer is: {plain}.0 miles per hour.",
        "answer is, equation": f"The answer is {value - 1} + 1 = {plain}",
        "last number": f"We had 3 and then 4, in the end {commas}.",
        "last number, math": rf"In total \({plain}\) of them",
        "bare": plain,
    }


def wrong_ways(problem: Problem) -> dict[str, str]:
    """A changed number, after text in which the right one stands."""
    value = int(problem.value)
    changed = {
        "plus one": value + 1,
        "minus one": value - 1,
        "times ten": value * 10,
        "negated": -value,
    }
    digits = str(abs(value))
    swapped = digits[-1] + digits[1:-1] + digits[0] if len(digits) > 1 else digits + "0"
    changed["digits swapped"] = int(swapped)
    forms = {
        "marks": "{solution} so {right}\n#### {wrong}",
        "boxed": "#### {right} or rather \\boxed{{{wrong:,}}}",
        "answer is": "The answer is {right}. Checking, the answer is ${wrong:,}.",
        "last number": "{right} would be too easy: it is {wrong}",
    }
    return {
        f"{name}, {form}": template.format(
            solution=problem.solution.replace("####", ""), right=problem.answer, wrong=number
        )
        for name, number in changed.items()
        for form, template in forms.items()
        if number != value
    }


@needs_test_file
def test_every_row_accepts_the_reference_and_rejects_a_changed_number() -> None:
    """All 1,319 rows, each in every usual way, and each with every change."""
    problems = load_problems(TEST_FILE)
    assert len(problems) == 1319
    mistakes = []
    for index, problem in enumerate(problems, start=1):
        for name, text in right_ways(problem).items():
            if grade(problem, text).reward != 1.0:
                mistakes.append((index, "rejected", name, text))
        for name, text in wrong_ways(problem).items():
            if grade(problem, text).reward != 0.0:
                mistakes.append((index, "accepted", name, text))
    assert mistakes == []


@needs_test_file
def test_every_tenth_row_as_an_expression() -> None:
    """Answers left as a fraction or a product go through math-verify."""
    for problem in load_problems(TEST_FILE)[::10]:
        value = int(problem.value)
        for text, reward in (
            (rf"\boxed{{\frac{{{value * 2}}}{{2}}}}", 1.0),
            (rf"\boxed{{\frac{{{value * 2 + 1}}}{{2}}}}", 0.0),
            (f"#### {value - 5} + 5", 1.0),
            (f"#### {value - 5} + 6", 0.0),
        ):
            assert grade(problem, text).reward == reward, text


@needs_test_file
def test_worked_examples_earn_the_reward_on_every_row() -> None:
    """What a supervised warm-up teaches is what the grader accepts."""
    env = Gsm8k(1, TEST_FILE)
    seeds = range(500)
    for seed, (observation, text) in zip(seeds, env.examples(seeds), strict=True):
        assert env.reset([0], [seed]) == [observation]
        assert "<<" not in text
        assert env.step([0], [text])[0].reward == 1.0


def test_keeps_the_contract(rows_file: Path) -> None:
    """Same seed, same problem, in any slot and company; ended slots are refused."""
    checked = check(partial(Gsm8k, path=rows_file), actions=lambda observation: "#### 1,200")
    assert checked.ended == checked.episodes > 0


def test_reward_and_info(rows_file: Path) -> None:
    """1 for the reference, 0 for anything else; the log says what was read, by which rule."""
    env = Gsm8k(2, rows_file, prompt=r"{question} Use \boxed{}.", system="Be brief.", limit=1)
    observations = env.reset([0, 1], [5, 5])
    assert observations[0].messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content=r"What is 600 + 600? Use \boxed{}."),
    )
    right, wrong = env.step([1, 0], [r"\boxed{1200}", "It is 1201."])
    assert (right.reward, right.terminated, right.truncated) == (1.0, True, False)
    assert right.observation.messages == ()
    assert right.info == {"correct": 1.0, "answer": "1200", "rule": "boxed", "reference": "1200"}
    assert wrong.reward == 0.0
    assert wrong.info["answer"] == "1201"


def test_seeds_draw_rows_uniformly(rows_file: Path) -> None:
    """4,000 seeds over 8 rows: each near 500 (five standard deviations are 105)."""
    env = Gsm8k(1, rows_file)
    seen = Counter(env.reset([0], [seed])[0].messages[0].content for seed in range(4000))
    assert len(seen) == 8
    assert all(abs(count - 500) < 105 for count in seen.values())


def test_split_by_one_shuffle_is_disjoint_and_complete(rows_file: Path) -> None:
    """limit=5 and skip=5 of the same shuffle share no row; the shuffle is not the file's order."""

    def questions(**options: int) -> set[str]:
        env = Gsm8k(1, rows_file, prompt="{question}", **options)  # type: ignore[arg-type]
        return {env.reset([0], [seed])[0].messages[0].content for seed in range(300)}

    train, held_out = questions(shuffle_seed=1, limit=5), questions(shuffle_seed=1, skip=5)
    assert (len(train), len(held_out)) == (5, 3)
    assert train | held_out == {str(row["question"]) for row in ROWS}
    assert train != {str(row["question"]) for row in ROWS[:5]}


def test_step_without_reset_changes_nothing(rows_file: Path) -> None:
    """The error names the slot; the other slot of that call can still be stepped."""
    env = Gsm8k(2, rows_file)
    env.reset([0], [1])
    with pytest.raises(SimError, match="slot 1 has no episode"):
        env.step([0, 1], ["#### 1", "#### 2"])
    assert env.step([0], ["#### 1"])[0].terminated


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "#### 1"}\n{"question"', r"bad\.jsonl, line 2: .*one JSON"),
        (b"\xff\xfe\n", r"line 1: .*UTF-8"),
        (b"[1]\n", r"line 1: .*must be a JSON object.*\[1\]"),
        (b"[" * 100_000, r"line 1: "),
        (b'\n{"answer": "#### 1"}\n', r'line 2: "question" must be a string.*\[\'answer\'\]'),
        (b'{"question": "a", "answer": 5}\n', r'line 1: "answer" must be a string'),
        (b'{"question": "a", "answer": "5"}\n', r'line 1: .*number after "####"'),
        (b'{"question": "a", "answer": "#### five"}\n', r"line 1: .*must be one number.*'five'"),
        (b"\n\n", r"bad\.jsonl: no rows"),
    ],
)
def test_bad_files_name_line_and_rule(tmp_path: Path, content: bytes, message: str) -> None:
    """File, line number, what was seen, and the rule."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadTaskData, match=message):
        Gsm8k(1, path)


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    """A missing file is bad data, with its path and what to give."""
    with pytest.raises(BadTaskData, match=r"none\.jsonl: cannot be read \(No such file"):
        Gsm8k(1, tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "Solve this:"}, "has no"),
        ({"skip": 8}, "skip = 8 leaves none of the 8 rows"),
        ({"skip": -1}, "skip = -1"),
        ({"limit": 0}, "limit = 0"),
    ],
)
def test_wrong_arguments_say_the_rule(
    rows_file: Path, options: dict[str, Any], message: str
) -> None:
    """The value seen and the rule."""
    with pytest.raises(ValueError, match=message):
        Gsm8k(1, rows_file, **options)


def test_missing_math_verify_shows_at_the_start(
    rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not hours later, at the first answer that is an expression."""

    def missing() -> None:
        raise MissingDependency("pip install 'flowd[math]'")

    monkeypatch.setattr(gsm8k, "require_math_verify", missing)
    with pytest.raises(MissingDependency):
        Gsm8k(1, rows_file)


def test_reference_is_exact(tmp_path: Path) -> None:
    """Decimals and signs of the file are kept."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "so #### not this\\n#### -1,234.5 "}\n')
    (problem,) = load_problems(path)
    assert (problem.answer, problem.value) == ("-1234.5", Fraction(-2469, 2))
