"""A loop for the tests of actors: what it catches fails the test."""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

DEADLINE_S = 30.0
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(autouse=True)
def no_group_stays() -> Iterator[None]:
    """An engine that computes in another precision joins a process group of one; tests that come later want theirs."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def run() -> Run:
    """Runs a coroutine function to its end; errors that the loop caught fail the test."""

    def runner(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        caught: list[dict[str, Any]] = []

        async def guarded() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: caught.append(context))
            async with asyncio.timeout(DEADLINE_S):
                await main()

        asyncio.run(guarded())
        assert not caught, caught

    return runner
