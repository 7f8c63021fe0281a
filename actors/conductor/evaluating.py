"""The conductor's evaluations: taken beside training, with one exact policy version, recorded once.

What keeps the version within reach and nothing lost (the conductor asks `oldest` for both):

* While version e is evaluated no group is issued at a later version. So steps up to e + max_staleness can be taken, and
  version e is among the max_staleness + 2 that the node keeps.
* No commit goes beyond step e before the evaluation is recorded. So after a crash the job stands at e or before it, and
  an evaluation that was cut is taken again, whole; one that was recorded and not rolled back is not.

Evaluations are no groups: the ledger does not know them, and nothing of them reaches the trainer.
"""

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.conductor.config import evaluates
from actors.conductor.evaluation import Answer, metrics_of, score_of, summary, tickets
from actors.conductor.ledger_audit import beginnings
from actors.conductor.metrics import MetricsWriter
from actors.job_config import JobConfig
from actors.json_lines import line_of
from actors.retention import score_commit
from channels.channel import Producer
from channels.errors import Withdrawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation is complete; it counts once `Evaluator.record` has written it."""

    version: int
    run_attempt: int
    answers: list[Answer]
    seconds: float


class Evaluator:
    """One per conductor. done(evaluated): an evaluation is complete; progressed(): one of its problems is."""

    def __init__(
        self,
        config: JobConfig,
        run_dir: Path,
        producer: Producer,
        metrics: MetricsWriter,
        *,
        done: Callable[[Evaluated], None],
        progressed: Callable[[], None],
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._producer = producer
        self._metrics = metrics
        self._done = done
        self._progressed = progressed
        self._run_attempt = -1
        self._outstanding: deque[int] = deque()
        self._changed = asyncio.Event()
        self._scores: dict[int, float] = {}  # of the versions that were evaluated

    @property
    def oldest(self) -> int | None:
        """The version that is being evaluated; None when none is."""
        return self._outstanding[0] if self._outstanding else None

    def begin_run(self, run_attempt: int, recorded: Mapping[int, Mapping[str, Any]]) -> None:
        """A run attempt begins: what is being taken is forgotten. recorded: as `recorded_evaluations` finds them."""
        self._run_attempt = run_attempt
        self._outstanding.clear()
        self._producer.cancel(lambda pending: True)
        self._scores = {version: score_of(line) for version, line in recorded.items()}
        self._changed.set()

    def is_due(self, version: int) -> bool:
        """Whether the version is to be evaluated and was not yet."""
        if not evaluates(self._config.job, self._config.eval):
            return False
        every, last = self._config.eval.every_steps, version >= self._config.job.steps
        return self._is_new(version) and (last or version % every == 0)

    def start(self, version: int) -> None:
        """Evaluate a version after those before it; nothing for one that was evaluated, or in a job that never does."""
        if evaluates(self._config.job, self._config.eval) and self._is_new(version):
            self._outstanding.append(version)
            self._changed.set()

    def _is_new(self, version: int) -> bool:
        return version not in self._scores and version not in self._outstanding

    async def run(self) -> None:
        """Take the evaluations that were asked for, one after the other."""
        while True:
            while not self._outstanding:
                await self._change()
            run_attempt, version = self._run_attempt, self._outstanding[0]
            began = time.monotonic()
            try:
                answers = await self._take(version, run_attempt)
            except Withdrawn:
                continue  # the job was rolled back
            evaluated = Evaluated(
                version=version,
                run_attempt=run_attempt,
                answers=answers,
                seconds=time.monotonic() - began,
            )
            self._done(evaluated)
            while self.counts(evaluated):  # until it is recorded, or forgotten
                await self._change()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _take(self, version: int, run_attempt: int) -> list[Answer]:
        made = tickets(
            self._config.eval, self._config.rollout, version=version, run_attempt=run_attempt
        )

        async def ask(ticket: dict[str, Any]) -> Answer:
            answer: Answer = await self._producer.call(ticket)
            self._progressed()
            return answer

        return list(await asyncio.gather(*map(ask, made)))

    def counts(self, evaluated: Evaluated) -> bool:
        """Whether the evaluation is to be recorded: it was not yet, and its run attempt was not rolled back."""
        return evaluated.run_attempt == self._run_attempt and evaluated.version == self.oldest

    def record(self, evaluated: Evaluated) -> dict[str, Any]:
        """Write an evaluation down; blocking. Returns its line of metrics.jsonl, which makes it count."""
        config = self._config
        result = summary(config.eval, evaluated.answers)
        head = {
            "step": evaluated.version,
            "attempt": evaluated.run_attempt,
            "time": round(time.time(), 3),
        }
        line = {**head, "eval_seconds": round(evaluated.seconds, 4), **metrics_of(result)}
        settings = {
            "task": config.eval.task or config.env.task,
            "k": config.eval.k,
            "temperature": (
                config.rollout.temperature
                if config.eval.temperature is None
                else config.eval.temperature
            ),
            **_generation(config),
            "seed": config.eval.seed,
            "success": config.eval.success,
            "success_at": config.eval.success_at,
        }
        whole = {**head, "seconds": line["eval_seconds"], "settings": settings, **result}
        with (self._run_dir / "eval_samples.jsonl").open("ab") as file:
            file.write(b"".join(line_of(one) for a in evaluated.answers for one in a["lines"]))
        self._write_videos(evaluated)
        _write(evaluation_file(self._run_dir, evaluated.version), line_of(whole))
        self._metrics.write(line, only="eval_")
        score_commit(self._run_dir, evaluated.version, score_of(line))
        return line

    def _write_videos(self, evaluated: Evaluated) -> None:
        folder = self._run_dir / "videos" / f"step-{evaluated.version:08d}"
        for answer in evaluated.answers:
            if answer["video"]:
                folder.mkdir(parents=True, exist_ok=True)
                name = f"problem-{answer['problem']}-{answer['mode']}.mp4"
                (folder / name).write_bytes(answer["video"])

    def committed(self, step: int) -> None:
        """A step's commit is on disk: say how good it is, if that is known already; blocking."""
        if step in self._scores:
            score_commit(self._run_dir, step, self._scores[step])

    def recorded(self, evaluated: Evaluated, line: Mapping[str, Any]) -> None:
        """`record` returned the line: the next one may begin."""
        self._scores[evaluated.version] = score_of(line)
        self._outstanding.popleft()
        self._changed.set()


def _generation(config: JobConfig) -> dict[str, Any]:
    """Settings that only a language model has."""
    if config.policy is not None:
        return {}
    return {"top_k": config.rollout.top_k, "max_new_tokens": config.rollout.max_new_tokens}


def evaluation_file(run_dir: Path, version: int) -> Path:
    """Where the whole result of a version's evaluation is."""
    return run_dir / "evals" / f"step-{version:08d}.json"


def recorded_evaluations(run_dir: Path) -> dict[int, Mapping[str, Any]]:
    """The lines of metrics.jsonl that tell of an evaluation, by version; of those rolled back, none."""
    began_at = beginnings(run_dir)
    found: dict[int, Mapping[str, Any]] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return found
    for text in lines:
        if b'"eval_problems"' not in text or not text.endswith(b"\n"):
            continue
        line = json.loads(text)
        version, attempt = line["step"], line["attempt"]
        # A policy is the work of the steps before it: a later attempt that began at it has the same.
        if all(later <= attempt or step >= version for later, step in began_at.items()):
            found[version] = line
    return found


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
