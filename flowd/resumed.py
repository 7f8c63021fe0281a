"""What may change in a job that goes on from a commit: anything but what its groups and weights were made with."""

import os
from pathlib import Path

from actors.job_config import JobConfig
from flowd.errors import RequestError
from flowd.toml_text import value_text

FIXED = ("job.name", "job.seed", "model", "policy", "env.task")


def refuse_changes(before: JobConfig, now: JobConfig) -> None:
    """Raise RequestError for the first change that the commit does not allow."""
    for place in FIXED:
        section, _, key = place.partition(".")
        old, new = getattr(before, section), getattr(now, section)
        if key:
            old, new = getattr(old, key), getattr(new, key)
        if old != new:
            seen = (
                f"{place} = {value_text(new)}, and was {value_text(old)}"
                if key
                else f"[{section}] differs"
            )
            raise RequestError(
                f'job "{before.job.name}" cannot go on with another {place} ({seen}): what it has learnt and which '
                "groups it has seen depend on it; submit another job, from `flowctl export` perhaps"
            )


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
