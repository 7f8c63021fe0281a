"""A reward for programs: the reply's last fenced block of Python is run against the tests of its row, in a sandbox.

Tests that are code run in the program's own process: they are as hard to deceive as Python lets them be, which is not
very (a program may redefine what they compare). Pairs of input and output are judged out of its reach.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from sim.errors import BadTaskData
from sim.text.rewards import Score
from sim.text.sandbox import Limits, Outcome, Sandbox, Trial

log = logging.getLogger(__name__)

# Fences as CommonMark has them: the closing one is at least as long, and alone in its line.
BLOCK = re.compile(
    r"^ {0,3}(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^ {0,3}(?P=fence)[`~]*[ \t]*$",
    re.DOTALL | re.MULTILINE,
)
PYTHON = ("", "py", "python", "python3")


class PythonTests:
    """1 where the program passes every test of its row, else 0. `info` has the share of tests passed, and why not all.

    field: of the row. A text of code, a list of such texts (as asserts), or a list of {input, output} for standard
        input and output, of which white space at ends of lines and of the text does not count
    partial: the share of tests passed instead of 0 or 1
    packages: programs may import what is installed beside the interpreter; else the standard library only
    allow_unprotected: run programs also where this machine lacks a protection; the log says what they can do then
    the rest: see `sim.text.sandbox.Limits`

    SandboxError: a protection is missing and not waived.
    """

    def __init__(
        self,
        *,
        field: str = "tests",
        partial: bool = False,
        packages: bool = False,
        allow_unprotected: bool = False,
        timeout_s: float = 5.0,
        total_s: float = 30.0,
        memory_mb: int = 512,
        processes: int = 16,
        file_mb: int = 16,
        disk_mb: int = 32,
        files: int = 256,
        output_kb: int = 256,
    ) -> None:
        self._field = field
        self._partial = partial
        self._sandbox = Sandbox(
            Limits(
                timeout_s=timeout_s,
                total_s=total_s,
                memory_mb=memory_mb,
                processes=processes,
                file_mb=file_mb,
                disk_mb=disk_mb,
                files=files,
                output_kb=output_kb,
            ),
            packages=packages,
            allow_unprotected=allow_unprotected,
        )
        if self._sandbox.missing:
            log.warning("reward=python_tests unprotected=%r", self._sandbox.missing)

    def __call__(self, reply: str, row: Mapping[str, Any]) -> Score:
        """Run the tests of one reply. BadTaskData: the field holds no tests."""
        trials, outputs = self._tests(row.get(self._field))
        program = extract(reply)
        if program is None:
            return Score(value=0.0, info={"passed": 0.0, "reason": "no program"})
        outcomes = self._sandbox.run(program, trials, stop_at_first=not self._partial)
        reasons = [
            outcome.reason or _wrong(outcome, output)
            for outcome, output in zip(outcomes, outputs, strict=False)
        ]
        passed = reasons.count("") / len(trials)
        reason = next(filter(None, reasons), "" if passed == 1 else "out of time")
        value = passed if self._partial else float(passed == 1)
        return Score(value=value, info={"passed": passed, "reason": reason[:100]})

    def _tests(self, value: Any) -> tuple[list[Trial], list[str | None]]:
        """What to run, and the output that is wanted of each."""
        tests = [value] if isinstance(value, str) else value
        trials: list[Trial] = []
        outputs: list[str | None] = []
        for test in tests if isinstance(tests, list) else ():
            match test:
                case str():
                    trials.append(Trial(code=test))
                    outputs.append(None)
                case {"input": str(given), "output": str(wanted)}:
                    trials.append(Trial(input=given))
                    outputs.append(wanted)
                case _:
                    trials = []
                    break
        if not trials:
            raise BadTaskData(
                f'"{self._field}" must be code, a list of code, or a list of '
                f'{{"input": text, "output": text}}; it is {value!r:.80}'
            )
        return trials, outputs


def extract(reply: str) -> str | None:
    """The last fenced block that is Python or does not say; None without one."""
    blocks = [m["code"] for m in BLOCK.finditer(reply) if m["language"].lower() in PYTHON]
    return blocks[-1] if blocks else None


def _wrong(outcome: Outcome, output: str | None) -> str:
    if output is None or _lines(outcome.output) == _lines(output):
        return ""
    return "wrong output"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
