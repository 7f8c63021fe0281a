"""The env actor's part of an evaluation: which problems there are, and what is told of each.

Problems are a pure function of [eval] seed and their number, by keys of purposes that nothing else has: a task that
draws at random draws anew, one that goes through rows (counted seeds) plays each of its split before any again.
"""

from collections.abc import Sequence
from typing import Any

from actors.episodes import Segment
from actors.randomness import fold
from actors.samples import sample_lines
from sim.contract import counted_seed

SEED_OF_EVALUATION = 4  # purpose of the key that makes a problem's seed: never a seed of training
KEY_OF_EVALUATION = 5  # purpose of the key that a problem's draws come from


def evaluation_seed(seed: int, problem: int, *, counted: bool) -> int:
    """The seed that the environment is reset with."""
    if counted:
        return counted_seed(fold(seed, SEED_OF_EVALUATION), problem)
    return fold(seed, SEED_OF_EVALUATION, problem) >> 1


def outcome(ticket: dict[str, Any], segments: Sequence[Segment], video: bytes) -> dict[str, Any]:
    """What the conductor is told of a problem that was played, each list by sample. video: of the first, or nothing"""
    where = {name: ticket[name] for name in ("step", "attempt", "problem", "mode")}
    recorded = segments if ticket["record"] else ()  # long episodes of arrays are long to write
    lines = [line for segment in recorded for line in sample_lines(segment, **where)]
    return {
        "problem": ticket["problem"],
        "mode": ticket["mode"],
        "rewards": [segment.episode_return for segment in segments],
        "infos": [dict(segment.info) for segment in segments],
        "tokens": [segment.num_tokens for segment in segments],
        "lines": lines,
        "video": video,
    }
