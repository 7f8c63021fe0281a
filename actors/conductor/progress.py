"""Notices that a job takes no step any more, and asks every actor which call it hangs in."""

import asyncio
import contextlib

from actors.actor import Actor
from actors.conductor.guards import no_progress
from channels.work import AskCall, InCall

ANSWER_S = 1.0  # an actor's loop is free: one that does not answer by then hangs itself


class ProgressWatch:
    """One per conductor, which says when a step was `made` and who `answered`.

    limit_s: without progress    asks: on whose behalf its peers are asked
    """

    def __init__(self, limit_s: float, asks: Actor) -> None:
        self._limit_s = limit_s
        self._asks = asks
        self._progress = asyncio.Event()
        self._calls: dict[str, InCall] = {}
        self._called = asyncio.Event()

    def made(self) -> None:
        """There was progress. The first time begins the count: a trainer's warm-up is not part of it."""
        self._progress.set()

    def answered(self, peer: str, call: InCall) -> None:
        """A peer says what it does."""
        self._calls[peer] = call
        self._called.set()

    async def stalled(self) -> str:
        """Return once the job stands still: why it is to be ended."""
        await self._progress.wait()
        while True:
            self._progress.clear()
            try:
                async with asyncio.timeout(self._limit_s):
                    await self._progress.wait()
            except TimeoutError:
                where = await self._where_it_hangs()
                if not self._progress.is_set():  # else a step was taken after all
                    return no_progress(self._limit_s, where)

    async def _where_it_hangs(self) -> dict[str, InCall | None]:
        """By actor the call that it is in; None for one whose loop does not answer."""
        peers = self._asks.peers
        self._calls.clear()
        asked = sorted(peers)
        for name in asked:
            self._asks.endpoint.send(name, AskCall())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._limit_s, ANSWER_S)):
                while not self._calls.keys() >= set(asked) & peers.keys():
                    self._called.clear()
                    await self._called.wait()
        calls = {name: self._calls.get(name) for name in asked if name in peers}
        return {name.rpartition("/")[2]: call for name, call in calls.items()} | {
            self._asks.spec.actor: self._asks.in_call()
        }
