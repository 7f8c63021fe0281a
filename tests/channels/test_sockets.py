"""Drained sockets: no message is forgotten, whatever else happens on the socket."""

import asyncio
import select
from pathlib import Path

import pytest
import zmq
from channel_peers import DEADLINE_S, Run

from channels.sockets import DrainedSocket


def test_a_send_that_fails_forgets_no_message(run: Run, sockets: Path) -> None:
    """The answer to a client that left takes the edge of the request that another has sent meanwhile."""

    async def main() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        router.bind(f"ipc://{sockets}/r")
        arrived: asyncio.Queue[bytes] = asyncio.Queue()
        drained = DrainedSocket(router, lambda frames: arrived.put_nowait(frames[1].bytes))
        client = context.socket(zmq.DEALER)
        client.connect(f"ipc://{sockets}/r")
        client.send(b"first")
        assert await arrived.get() == b"first"
        client.send(b"second")
        # The loop stands still: only the socket knows.
        assert select.select([router.getsockopt(zmq.FD)], [], [], DEADLINE_S)[0]
        with pytest.raises(zmq.ZMQError):
            drained.send([b"who left", b"answer"])
        assert await arrived.get() == b"second"
        client.close(0)
        drained.close()

    run(main)
