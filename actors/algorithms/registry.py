"""Algorithms by the name in [algorithm]. Torch-free until one is asked for."""

from difflib import get_close_matches
from importlib import import_module
from typing import cast

from actors.algorithms.config import PAPERS
from actors.algorithms.contract import Algorithm


def find(name: str) -> Algorithm:
    """The algorithm's module. Raises ValueError for a name that is not in `PAPERS`."""
    if name not in PAPERS:
        near = get_close_matches(name, PAPERS, n=1)
        known = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(PAPERS)}"
        raise ValueError(f'[algorithm] name = "{name}": {known}')
    return cast(Algorithm, import_module(f"actors.algorithms.{name}"))
