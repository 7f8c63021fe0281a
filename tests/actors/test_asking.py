"""Requests for actions: which share an item, and that each gets its own answer whatever happens to the others."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import actors.wire  # noqa: F401  registers the payload types
from actors.env.asking import Asking
from actors.episodes import SampleRequest, Sampling, TurnRequest
from channels.channel import ChannelRouter, Consumer, Item
from channels.errors import Withdrawn
from channels.inline import InlineHub

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


def request(group: int, samples: int = 1, **given: Any) -> TurnRequest:
    made = TurnRequest(
        group=group,
        attempt=0,
        run_attempt=0,
        turn=0,
        version=0,
        exact=False,
        samples=tuple(
            SampleRequest(
                sample=sample,
                history=np.zeros(0, dtype=np.int32),
                observation={"state": np.full(3, group, dtype=np.float32)},
            )
            for sample in range(samples)
        ),
    )
    return replace(made, **given)


class Play:
    """An env actor's end of the channel, and the ends of some rollout actors."""

    def __init__(self, *, together: bool = True, rollouts: int = 1, max_samples: int = 64) -> None:
        hub = InlineHub()
        env = hub.endpoint("env")
        self.producer = ChannelRouter(env).producer("requests", bound=16)
        self.asking = Asking(
            self.producer,
            together=together,
            max_samples=max_samples,
            num_rollouts=lambda: len(self.rollouts),
        )
        self.rollouts: list[Consumer] = []
        for number in range(rollouts):
            name = f"rollout-{number}"
            end = hub.endpoint(name)
            env.connect(name, end.address)
            end.connect("env", env.address)
            self.rollouts.append(ChannelRouter(end).consumer("requests", capacity=16))
            self.rollouts[-1].add_producer("env")
            self.producer.add_consumer(name)

    def ask(self, made: TurnRequest, priority: int = 0) -> asyncio.Task[Any]:
        return asyncio.create_task(self.asking.ask(made, key=str(made.group), priority=priority))


def groups(item: Item) -> list[int]:
    return [one.group for one in item.payload]


def answer(item: Item) -> None:
    """Every sample's action is its group and number, which is all that the tests look at."""
    item.ack(tuple((one.group, s.sample) for one in item.payload for s in one.samples))


def test_what_is_asked_in_one_turn_of_the_loop_is_one_item(run: Run) -> None:
    """And what is asked later another one, though the first has no answer yet."""

    async def main() -> None:
        play = Play()
        asked = [play.ask(request(group, samples=1 + group % 2)) for group in range(4)]
        item = await play.rollouts[0].get()
        assert groups(item) == [0, 1, 2, 3]
        later = play.ask(request(9))
        second = await play.rollouts[0].get()
        answer(second)
        assert await later == ((9, 0),)
        assert not any(task.done() for task in asked)
        answer(item)
        assert await asyncio.gather(*asked) == [
            ((0, 0),),
            ((1, 0), (1, 1)),
            ((2, 0),),
            ((3, 0), (3, 1)),
        ]

    run(main)


@pytest.mark.parametrize(
    "different",
    [{"run_attempt": 1}, {"exact": True}, {"sampling": Sampling(temperature=0.0)}],
)
def test_what_may_be_answered_differently_travels_apart(
    run: Run, different: dict[str, Any]
) -> None:
    """An item is answered with one policy version and one transform."""

    async def main() -> None:
        play = Play()
        asked = [play.ask(request(0)), play.ask(request(1, **different)), play.ask(request(2))]
        items = [await play.rollouts[0].get() for _ in range(2)]
        assert sorted(groups(item) for item in items) == [[0, 2], [1]]
        for item in items:
            answer(item)
        assert await asyncio.gather(*asked) == [((n, 0),) for n in range(3)]

    run(main)


def test_groups_of_different_steps_share_an_item(run: Run) -> None:
    """It asks for the newest of their versions, and is as urgent as the first step; exact versions stay apart."""

    async def main() -> None:
        play = Play()
        asked = [
            play.ask(request(0, version=3), priority=-3),
            play.ask(request(1, version=2), priority=-2),
            play.ask(request(2, version=2, exact=True)),
            play.ask(request(3, version=3, exact=True)),
        ]
        items = [await play.rollouts[0].get() for _ in range(3)]
        assert sorted(groups(item) for item in items) == [[0, 1], [2], [3]]
        (shared,) = (item for item in items if groups(item) == [0, 1])
        assert [one.version for one in shared.payload] == [3, 3]
        assert shared.priority == -2
        for item in items:
            answer(item)
        await asyncio.gather(*asked)

    run(main)


def test_rollout_actors_share_what_is_asked_at_once(run: Run) -> None:
    """A large policy is not to compute everything in one place; nor more than fits."""

    async def main() -> None:
        play = Play(rollouts=2)
        asked = [play.ask(request(group)) for group in range(5)]
        items = [await rollout.get() for rollout in play.rollouts]
        assert sorted(groups(item) for item in items) == [[0, 1, 2], [3, 4]]
        for item in items:
            answer(item)
        await asyncio.gather(*asked)

        play = Play(max_samples=4)
        asked = [play.ask(request(group, samples=3 if group else 5)) for group in range(3)]
        items = [await play.rollouts[0].get() for _ in range(3)]
        assert [groups(item) for item in items] == [[0], [1], [2]]
        for item in items:
            answer(item)
        await asyncio.gather(*asked)

    run(main)


def test_a_group_that_is_cancelled_leaves_the_others_theirs(run: Run) -> None:
    """Its part of the answer is dropped; the item is withdrawn once nobody waits for any of it."""

    async def main() -> None:
        play = Play()
        first, second = play.ask(request(0)), play.ask(request(1))
        item = await play.rollouts[0].get()
        first.cancel()
        await asyncio.wait({first})
        assert not item.cancelled
        answer(item)
        assert await second == ((1, 0),)

        first, second = play.ask(request(2)), play.ask(request(3))
        item = await play.rollouts[0].get()
        first.cancel()
        second.cancel()
        await item.wait_cancelled()
        item.ack()
        for error in await asyncio.gather(first, second, return_exceptions=True):
            assert isinstance(error, asyncio.CancelledError)
        unheard = play.ask(request(4))
        await asyncio.sleep(0)  # it has asked
        unheard.cancel()
        kept = play.ask(request(5))
        item = await play.rollouts[0].get()
        assert groups(item) == [5]
        answer(item)
        await kept

    run(main)


def test_an_error_is_everybodys(run: Run) -> None:
    """As if each had asked alone; and so is the end of the actor."""

    async def main() -> None:
        play = Play()
        asked = [play.ask(request(group)) for group in range(2)]
        item = await play.rollouts[0].get()
        assert play.producer.cancel(lambda pending: True) == 1
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, Withdrawn)
        await item.wait_cancelled()
        item.ack()
        asked = [play.ask(request(group)) for group in range(2)]
        item = await play.rollouts[0].get()
        play.asking.close()
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, asyncio.CancelledError)
        await item.wait_cancelled()

    run(main)


def test_text_travels_a_group_an_item(run: Run) -> None:
    """Its sequences end one by one, and a key leads to the rollout actor that has its prefix."""

    async def main() -> None:
        play = Play(together=False)
        asked = [play.ask(request(group)) for group in range(2)]
        items = [await play.rollouts[0].get() for _ in range(2)]
        assert [(item.payload.group, item.key) for item in items] == [(0, "0"), (1, "1")]
        for item in items:
            item.ack((item.payload.group,))
        assert await asyncio.gather(*asked) == [(0,), (1,)]

    run(main)
