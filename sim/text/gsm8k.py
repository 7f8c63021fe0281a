"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems whose answer is one number."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from sim.contract import ChatMessage, StepResult, TextObservation
from sim.errors import BadTaskData, SimError
from sim.text.grading import final_answer, is_correct, require_math_verify
from sim.text.rows import parse

PROMPT = (
    "{question}\n\n"
    "Think step by step, then end with a line that holds only the final number, like this: #### 42"
)

REFERENCE = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,30})(?:\.[0-9]{1,30})?")
CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")  # as in "16 - 3 = <<16-3=13>>13"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row: its question, the worked solution before `####`, and the final number after it."""

    question: str
    solution: str
    answer: str  # as in the file, without thousands separators
    value: Fraction


class Gsm8k:
    """One turn: a question as a user message, then a reply whose final number earns 1 or 0.

    num_slots: episodes hosted at the same time
    path: JSON lines with `question` and `answer`, the final number of the answer after `####`
    prompt: the user message; "{question}" in it is replaced, other braces stay
    system: a system message before it; none when empty
    shuffle_seed: shuffle the rows by this seed first; None keeps the order of the file
    skip, limit: of those rows, leave out the first `skip` and keep at most `limit` of the others;
        the same shuffle_seed with (limit=7000) and with (skip=7000) splits a file in two

    A problem is a pure function of the episode's seed: each of the n rows kept is drawn with equal
    probability, so seeds that count up do not walk through the rows. What counts as the answer of a
    reply is told in `sim.text.grading`. `info` has `correct` (1 or 0), `answer` as it was read
    ("" if it was not), `rule` by which it was found, and `reference`.

    BadTaskData: the file is missing or a row breaks a rule. ValueError: an argument does.
    MissingDependency: math-verify is not installed.
    """

    def __init__(
        self,
        num_slots: int,
        path: str | Path,
        *,
        prompt: str = PROMPT,
        system: str = "",
        shuffle_seed: int | None = None,
        skip: int = 0,
        limit: int | None = None,
    ) -> None:
        if "{question}" not in prompt:
            raise ValueError(f'prompt = {prompt!r} has no "{{question}}": say where it goes')
        if skip < 0 or (limit is not None and limit < 1):
            raise ValueError(f"skip = {skip}, limit = {limit}: the rule is skip >= 0, limit >= 1")
        require_math_verify()
        problems = load_problems(path)
        if skip >= len(problems):
            raise ValueError(f"skip = {skip} leaves none of the {len(problems)} rows of {path}")
        if shuffle_seed is not None:
            # Sorting by `random()` rather than `shuffle`: only the former is promised to stay the
            # same in every version of Python, and a split must not leak after an upgrade.
            draw = random.Random(shuffle_seed).random
            problems = [row for _, _, row in sorted((draw(), i, p) for i, p in enumerate(problems))]
        self._problems = problems[skip : None if limit is None else skip + limit]
        self._prompt = prompt
        self._system = system
        self._playing: list[Problem | None] = [None] * num_slots

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[TextObservation]:
        """Pose the problem of each seed."""
        observations = []
        for slot, seed in zip(slots, seeds, strict=True):
            problem = self._playing[slot] = self._problem(seed)
            observations.append(self._pose(problem))
        return observations

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        """Grade each reply. Every episode ends here. SimError: a slot has no episode."""
        problems = [self._problem_of(slot) for slot in slots]
        results = [grade(problem, text) for problem, text in zip(problems, actions, strict=True)]
        for slot in slots:
            self._playing[slot] = None
        return results

    def close(self) -> None:
        """Nothing to free."""

    def examples(self, seeds: Sequence[int]) -> list[tuple[TextObservation, str]]:
        """Worked examples for a supervised warm-up: the observation of each seed and its solution.

        Solutions end in "#### 42" and come without the calculator notes of the file.
        """
        return [
            (self._pose(problem), f"{problem.solution}\n#### {problem.answer}")
            for problem in map(self._problem, seeds)
        ]

    def _problem(self, seed: int) -> Problem:
        return self._problems[int(random.Random(seed).random() * len(self._problems))]

    def _problem_of(self, slot: int) -> Problem:
        problem = self._playing[slot]
        if problem is None:
            raise SimError(f"slot {slot} has no episode (ended or never begun): reset it first")
        return problem

    def _pose(self, problem: Problem) -> TextObservation:
        question = self._prompt.replace("{question}", problem.question)
        user = ChatMessage(role="user", content=question)
        if not self._system:
            return TextObservation(messages=(user,))
        return TextObservation(messages=(ChatMessage(role="system", content=self._system), user))


def grade(problem: Problem, reply: str) -> StepResult:
    """Grade one reply: reward 1.0 where its final answer equals the reference, else 0.0."""
    answer = final_answer(reply)
    correct = float(is_correct(answer, problem.value))
    return StepResult(
        observation=TextObservation(messages=()),
        reward=correct,
        terminated=True,
        truncated=False,
        info={
            "correct": correct,
            "answer": str(answer),
            "rule": answer.rule,
            "reference": problem.answer,
        },
    )


def load_problems(path: str | Path) -> list[Problem]:
    """Read a file of problems; blank lines are skipped. BadTaskData names the file and the line."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise BadTaskData(
            f"{path}: cannot be read ({error.strerror}); give the path of a JSON lines file with "
            "`question` and `answer`, such as train.jsonl of openai/grade-school-math"
        ) from error
    problems = [
        _parse(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not problems:
        raise BadTaskData(f"{path}: no rows; at least one is needed")
    return problems


def _parse(line: bytes, where: str) -> Problem:
    row = parse(line, where)
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            raise BadTaskData(f'{where}: "{key}" must be a string; the row has {sorted(row)}')
    solution, marker, answer = row["answer"].rpartition("####")
    answer = answer.strip()
    if not marker:
        raise BadTaskData(f'{where}: "answer" must hold the final number after "####"')
    if not REFERENCE.fullmatch(answer):
        raise BadTaskData(
            f'{where}: what follows "####" must be one number such as 1,234 or -0.5, '
            f"and this is {answer[:60]!r}"
        )
    answer = answer.replace(",", "")
    return Problem(
        question=row["question"],
        solution=CALCULATOR_NOTE.sub("", solution).strip(),
        answer=answer,
        value=Fraction(answer),
    )
