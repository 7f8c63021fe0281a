"""A loop for the tests of actors: what it catches fails the test."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

DEADLINE_S = 30.0
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


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
