"""One call on the loop for many signs from any thread that there is something to do."""

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class OnLoop:
    """Has `work` called in the loop's next turn, once, however often and from wherever it is asked for.

    Made on the running loop. Finalizers call it: it neither waits nor raises, also when the loop has ended.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._closed = False

    def soon(self) -> None:
        """Ask for it."""
        if self._scheduled or self._closed:
            return
        self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self._now)
        except RuntimeError:
            log.debug("the loop is closed: nothing is returned any more")

    def close(self) -> None:
        """Schedule nothing more."""
        self._closed = True

    def _now(self) -> None:
        self._scheduled = False
        self._work()
