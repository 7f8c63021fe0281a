"""Blocking work in a thread, for tasks that may be cancelled: a thread cannot be, so its result is taken back."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def in_thread(
    function: Callable[..., T], *args: object, undo: Callable[[T], None] | None = None
) -> T:
    """The result of a call. Cancelled, it waits for the end of the call and undoes it, then goes on with the cancel."""
    # No task: a loop that ends cancels its tasks, and the result would be lost.
    call = asyncio.get_running_loop().run_in_executor(None, function, *args)
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        while not call.done():
            try:
                await asyncio.wait([call])
            except asyncio.CancelledError:
                continue  # asked again: still not before the thread is out
        if undo is not None and call.exception() is None:
            undo(call.result())
        raise
