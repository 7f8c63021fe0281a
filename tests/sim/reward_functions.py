"""Rewards as users write them, by import path."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

from sim.text.rewards import Score

release = threading.Event()
meeting = threading.Barrier(2)
closed: list[str] = []


def length(reply: str, row: Mapping[str, Any], *, most: int = 10) -> float:
    return min(len(reply), most) / most


def told(reply: str, row: Mapping[str, Any]) -> Score:
    return Score(value=0.5, info={"first": reply[:1]})


def breaks(reply: str, row: Mapping[str, Any]) -> float:
    raise ZeroDivisionError("the abacus is broken")


def returns(reply: str, row: Mapping[str, Any], *, what: Any) -> Any:
    return {"nan": float("nan"), "text": "1", "none": None}[what]


def waits(reply: str, row: Mapping[str, Any]) -> float:
    """Ends when the test lets it."""
    release.wait(timeout=60)
    return 1.0


def meets(reply: str, row: Mapping[str, Any]) -> float:
    """Ends when two of it are called at a time."""
    meeting.wait(timeout=60)
    return 1.0


async def asks(reply: str, row: Mapping[str, Any]) -> float:
    await asyncio.sleep(0)
    return float(len(reply))


async def never(reply: str, row: Mapping[str, Any]) -> float:
    await asyncio.get_running_loop().create_future()
    return 1.0


class Judge:
    """Made once; async too."""

    def __init__(self, *, name: str) -> None:
        self.name = name

    async def __call__(self, reply: str, row: Mapping[str, Any]) -> Score:
        return Score(value=1.0, info={"by": self.name})

    def close(self) -> None:
        closed.append(self.name)
