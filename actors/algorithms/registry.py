"""Algorithms by the name in [algorithm]. Torch-free until one is asked for."""

from difflib import get_close_matches
from importlib import import_module
from typing import cast

from actors.algorithms.contract import Algorithm

ALGORITHMS = {"grpo": "actors.algorithms.grpo"}


def find(name: str) -> Algorithm:
    """The algorithm's module. Raises ValueError for a name that is not in the table."""
    if name not in ALGORITHMS:
        near = get_close_matches(name, ALGORITHMS, n=1)
        known = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(ALGORITHMS)}"
        raise ValueError(f'[algorithm] name = "{name}": {known}')
    return cast(Algorithm, import_module(ALGORITHMS[name]))
