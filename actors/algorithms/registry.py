"""Algorithms by the name in [algorithm]. Torch-free until one is asked for."""

from importlib import import_module
from typing import cast

from actors.algorithms.contract import Algorithm

ALGORITHMS = {"grpo": "actors.algorithms.grpo"}


def find(name: str) -> Algorithm:
    """The algorithm's module. Raises ValueError for a name that is not in the table."""
    if name not in ALGORITHMS:
        raise ValueError(f'[algorithm] name = "{name}": known are {", ".join(ALGORITHMS)}')
    return cast(Algorithm, import_module(ALGORITHMS[name]))
