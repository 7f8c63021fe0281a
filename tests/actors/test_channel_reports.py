"""What heartbeats tell of channels."""

import asyncio

from actors.channel_reports import ChannelReports
from channels.channel import ChannelRouter
from channels.inline import InlineHub


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def turns() -> None:
    """Let what was sent arrive and be answered."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_rates_are_over_the_time_between_two_reports() -> None:
    """Four items of 1,000 bytes in two seconds; what waits, who waits; after a restart counts begin anew."""

    async def main() -> None:
        hub = InlineHub()
        here, there = hub.endpoint("j/env-0"), hub.endpoint("j/rollout-0")
        here.connect(there.name, there.address)
        there.connect(here.name, here.address)
        producer = ChannelRouter(here).producer("requests", bound=6)
        router = ChannelRouter(there)
        consumer = router.consumer("requests", capacity=4)
        producer.add_consumer(there.name)
        consumer.add_producer(here.name)
        clock = Clock()
        producing, consuming = (
            ChannelReports(end, clock) for end in (producer._router, consumer._router)
        )
        producing.report()
        for _ in range(6):
            await producer.put(bytes(1000))
        waiting = asyncio.create_task(producer.put(b""))
        item = await consumer.get()
        await turns()
        clock.now += 2.0
        (edge,) = producing.report()["producing"]
        assert (edge["channel"], edge["consumer"]) == ("requests", "j/rollout-0")
        assert (edge["transport"], edge["why"]) == ("inline", "same process: by reference")
        assert (edge["items_per_s"], edge["bytes_per_s"]) == (2.0, 2000.0)
        assert (edge["depth"], edge["in_flight"], edge["credit"]) == (2, 4, 0)
        assert (edge["waiters"], edge["size_bytes"]) == (1, 6000)
        assert consuming.report() == {
            "producing": [],
            "consuming": [{"channel": "requests", "depth": 3, "in_flight": 1, "waiters": 0}],
        }
        item.ack()
        await waiting
        await turns()
        clock.now += 2.0
        (edge,) = producing.report()["producing"]
        assert (edge["items_per_s"], edge["waiters"]) == (0.5, 0)
        producer.remove_consumer(there.name)
        producer.add_consumer(there.name)
        await turns()
        clock.now += 2.0
        (edge,) = producing.report()["producing"]
        assert edge["items_per_s"] == 2.0  # the four in flight were sent again, on a new link
        here.disconnect(there.name)
        assert producing.report()["producing"] == []

    asyncio.run(main())
