"""How an env actor asks for actions: a turn's request of a group is an item of its own, or one of several in an item.

Policies that act on arrays answer all samples of a request with one forward pass, and groups whose environments are
stepped together ask together: as one item they cost one message, one acknowledgement and one batch, where apart the
messages cost more than the pass. Sequences of tokens end one by one, so requests of text stay apart.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from actors.episodes import Action, TurnRequest
from channels.channel import Producer

Actions = tuple[Action | None, ...]


@dataclass(frozen=True)
class _Asked:
    request: TurnRequest
    priority: int
    answer: asyncio.Future[Actions]


class Asking:
    """Puts requests on the channel "requests" and hands the actions out.

    together: requests that are made in the same turn of the loop share items, if one policy version may answer them in
    the same way. Their group's version bounds those that ask for no exact one from below, and it was out when the
    group was issued; so all of an item ask for the newest among them, and have the highest of their priorities.
    max_samples: of an item, unless one request has more    num_rollouts: tells how many share what is asked at once
    """

    def __init__(
        self,
        requests: Producer,
        *,
        together: bool,
        max_samples: int,
        num_rollouts: Callable[[], int],
    ) -> None:
        self._requests = requests
        self._together = together
        self._max_samples = max_samples
        self._num_rollouts = num_rollouts
        self._waiting: list[_Asked] = []
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, request: TurnRequest, *, key: str, priority: int) -> Actions:
        """The action of every sample of the request, in order; None for one that has no room for another turn.

        key: those of one key prefer one rollout actor. Cancelling withdraws the request, an item once nobody waits for
        any of it. Raises as `Producer.call`.
        """
        if not self._together:
            actions: Actions = await self._requests.call(request, key=key, priority=priority)
            return actions
        loop = asyncio.get_running_loop()
        asked = _Asked(request, priority, loop.create_future())
        self._waiting.append(asked)
        if len(self._waiting) == 1:
            loop.call_soon(self._send)
        return await asked.answer

    def close(self) -> None:
        """Withdraw everything."""
        for call in self._calls:
            call.cancel()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        alike: dict[object, list[_Asked]] = {}
        for asked in waiting:
            if not asked.answer.done():
                r = asked.request
                kind = (r.run_attempt, r.version if r.exact else None, r.sampling)
                alike.setdefault(kind, []).append(asked)
        for of_a_kind in alike.values():
            for part in self._parts(of_a_kind):
                call = asyncio.create_task(self._call(part))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

    def _parts(self, asked: Sequence[_Asked]) -> Iterable[list[_Asked]]:
        """As many as there are rollout actors, or more where they would be too large."""
        fair = -(-len(asked) // max(1, self._num_rollouts()))
        part: list[_Asked] = []
        size = 0
        for one in asked:
            samples = len(one.request.samples)
            if part and (len(part) == fair or size + samples > self._max_samples):
                yield part
                part, size = [], 0
            part.append(one)
            size += samples
        yield part

    async def _call(self, asked: Sequence[_Asked]) -> None:
        this = asyncio.current_task()
        assert this is not None

        def given_up(_: asyncio.Future[Actions]) -> None:
            if all(one.answer.done() for one in asked):
                this.cancel()

        for one in asked:
            one.answer.add_done_callback(given_up)
        try:
            version = max(one.request.version for one in asked)
            actions: Actions = await self._requests.call(
                tuple(replace(one.request, version=version) for one in asked),
                priority=max(one.priority for one in asked),
            )
        except Exception as error:  # as if each had asked alone
            for one in asked:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        finally:
            for one in asked:
                one.answer.remove_done_callback(given_up)
                if this.cancelling():
                    one.answer.cancel()
        start = 0
        for one in asked:
            end = start + len(one.request.samples)
            if not one.answer.done():
                one.answer.set_result(actions[start:end])
            start = end
