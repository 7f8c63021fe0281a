"""The other process of the channel tests: `python peer_process.py ROLE NAME ADDRESS PEER PEER_ADDRESS`.

Says "ready" on stdout when it is connected; roles say more. Ends when its stdin is closed.
"""

import asyncio
import sys
from typing import Any

import uvloop

from channels.channel import ChannelRouter
from channels.endpoint import ZmqEndpoint
from channels.messages import Message


class Echo(Message, frozen=True, tag="test_echo"):
    """A message that comes back."""

    number: int


def say(*words: object) -> None:
    print(*words, flush=True)


async def echo(endpoint: ZmqEndpoint, peer: str) -> None:
    """Send everything back to whom it came from."""
    endpoint.on_message = endpoint.send
    say("ready")


async def double(endpoint: ZmqEndpoint, peer: str) -> None:
    """Acknowledge each item with twice its payload."""
    consumer = ChannelRouter(endpoint).consumer("work", capacity=4)
    consumer.add_producer(peer)
    say("ready")
    while True:
        item = await consumer.get()
        item.ack(item.payload * 2)


async def hold(endpoint: ZmqEndpoint, peer: str) -> None:
    """Take items and never finish them; say which, and when one is cancelled."""
    consumer = ChannelRouter(endpoint).consumer("work", capacity=4)
    consumer.add_producer(peer)
    say("ready")
    watches = []

    async def watch(item: Any) -> None:
        await item.wait_cancelled()
        say("cancelled", item.payload)

    while True:
        item = await consumer.get()
        say("holds", item.payload)
        watches.append(asyncio.create_task(watch(item)))


async def produce(endpoint: ZmqEndpoint, peer: str) -> None:
    """Put ten items, then say when all are acknowledged."""
    producer = ChannelRouter(endpoint).producer("work", bound=10, epoch=int(sys.argv[6]))
    producer.add_consumer(peer)
    for number in range(10):
        await producer.put({"epoch": int(sys.argv[6]), "number": number})
    say("ready")
    await producer.drained()
    say("drained")


async def main(role: str, name: str, address: str, peer: str, peer_address: str) -> None:
    loop = asyncio.get_running_loop()
    endpoint = ZmqEndpoint(name, address)
    endpoint.connect(peer, peer_address)
    ended = loop.run_in_executor(None, sys.stdin.read)
    task = asyncio.create_task(globals()[role](endpoint, peer))
    await ended
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    endpoint.close()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:6]))
