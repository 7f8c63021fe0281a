"""Tasks that a worker process opens by import path: one does as it is told, also the worst; one shows large arrays."""

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from sim.contract import ChatMessage, StepResult, TextObservation
from sim.errors import BadTaskData, SimError
from sim.spaces import ArraySpace


class Obedient:
    """An action is an order: "segfault", "hang", "exit", "raise", "wait PIPE", "stand" (end), or anything else."""

    counted_seeds = True

    def __init__(self, *, num_slots: int, open_with: str = "") -> None:
        self.seeds: dict[int, int] = {}
        if open_with:
            self.obey(open_with)

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[TextObservation]:
        self.seeds.update(zip(slots, seeds, strict=True))
        return [say(f"seed {seed}") for seed in seeds]

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        results = []
        for slot, action in zip(slots, actions, strict=True):
            self.obey(action)
            results.append(
                StepResult(
                    observation=say(f"did {action} for seed {self.seeds[slot]}"),
                    reward=0.5,
                    terminated=action == "stand",
                    truncated=False,
                    info={"pid": os.getpid(), "slots": len(slots)},
                )
            )
        return results

    def obey(self, order: str) -> None:
        print("talk on stdout must not disturb", flush=True)
        match order.split():
            case ["segfault"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["segfault", "once", marker]:
                if not os.path.exists(marker):
                    open(marker, "w").close()
                    os.kill(os.getpid(), signal.SIGSEGV)
            case ["hang"]:
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
                while True:
                    signal.pause()
            case ["exit"]:
                sys.exit(7)
            case ["raise"]:
                raise ZeroDivisionError("reward per second")
            case ["refuse"]:
                raise BadTaskData("row 3 is bad")
            case ["wait", pipe]:
                with open(pipe) as file:  # until somebody opens it for writing, and closes it
                    file.read()

    def close(self) -> None:
        """Nothing to free."""


def say(text: str) -> TextObservation:
    return TextObservation(messages=(ChatMessage(role="user", content=text),))


class Pictures:
    """Large arrays that grow with every step; they change after they were returned, were it not for the copies."""

    observation_space = {  # noqa: RUF012
        "picture": ArraySpace(shape=(64, 64, 3), dtype="uint8", low=0, high=255),
        "depth": ArraySpace(shape=(64, 64), dtype="float32", low=0, high=1e9),
    }
    action_space = ArraySpace(shape=(), dtype="int64", low=0, high=9)

    def __init__(self, *, num_slots: int) -> None:
        self.count = 0

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        return [self.observe(seed) for seed in seeds]

    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        return [
            StepResult(
                observation=self.observe(int(a)), reward=1.0, terminated=False, truncated=False
            )
            for a in actions
        ]

    def observe(self, value: int) -> Any:
        depth = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) + value
        return {"picture": np.full((64, 64, 3), value % 256, np.uint8), "depth": depth.T[::-1]}

    def render(self, slots: Sequence[int]) -> list[Any]:
        raise SimError("nothing to show")

    def close(self) -> None:
        """Nothing to free."""
