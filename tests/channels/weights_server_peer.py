"""Another node's host copy, in a process of its own: publishes what the lines of stdin say, and serves it over TCP.

    python weights_server_peer.py DIRECTORY VARIANT FETCHER_ADDRESS

Says its address, then answers each line of JSON with one: the variant that was published, and the bytes sent so far.
"""

import asyncio
import json
import sys
from typing import Any

import uvloop
from weights_publisher import KEEP, adapter, first_state, update

from channels.messages import Message
from channels.socket_endpoint import SocketEndpoint
from channels.weights import WeightsDirectory
from channels.weights.exchange import ForServer
from channels.weights.serving import WeightsServer


async def main() -> None:
    """Serve until stdin ends."""
    directory, variant, fetcher = sys.argv[1:]
    weights = WeightsDirectory(directory, keep=KEEP, variant=variant)
    endpoint = SocketEndpoint("trainer", "tcp://127.0.0.1:*")
    endpoint.connect("fetcher", fetcher)
    server = WeightsServer(endpoint, weights)

    def received(sender: str, message: Message, payload: Any) -> None:
        assert isinstance(message, ForServer)
        server.received(sender, message)

    endpoint.on_message = received
    print(json.dumps(endpoint.address), flush=True)
    state, updates = first_state(), 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        version, base = json.loads(line)
        while updates < version:
            updates += 1
            update(state, updates)
        given = state if base is None else adapter(version)
        published = weights.publish(
            0, version, given.items(), base=None if base is None else (0, base)
        )
        print(json.dumps([published.variant, server.bytes_sent]), flush=True)
    await server.close()
    endpoint.close()


if __name__ == "__main__":
    uvloop.run(main())
