"""The other process of the shared-memory tests: `python shm_reader.py ADDRESS PEER_ADDRESS SHARED_DIR`.

Keeps the array of each message and says the sum of its bytes; "again" on stdin says the sum of the kept one, "drop"
lets go of it.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from channels.messages import Message
from channels.socket_endpoint import SocketEndpoint


class Take(Message, frozen=True, tag="test_take"):
    """Here is an array."""


async def main(address: str, peer_address: str, shared_dir: str) -> None:
    """Answer each line of stdin with one on stdout, until stdin ends."""
    endpoint = SocketEndpoint("reader", address, shared_dir=Path(shared_dir))
    endpoint.connect("writer", peer_address)
    kept: list[Any] = []

    def say_sum() -> None:
        print(int(np.asarray(kept[0]).view(np.uint8).sum(dtype=np.int64)), flush=True)

    def take(sender: str, message: Message, payload: Any) -> None:
        kept[:] = [payload]
        say_sum()

    endpoint.on_message = take
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    print("ready", flush=True)
    while line := await reader.readline():
        if line == b"again\n":
            say_sum()
        elif line == b"drop\n":
            kept.clear()
            print("dropped", flush=True)
    endpoint.close()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
