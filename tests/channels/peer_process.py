"""The other process of the channel tests: `python peer_process.py ROLE NAME ADDRESS PEER PEER_ADDRESS`.

Says "at ADDRESS" and then "ready" on stdout when it is connected; roles say more. Ends when its stdin is closed.
"""

import argparse
import asyncio
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from channels.channel import BOUND_BYTES, ChannelRouter
from channels.messages import Message
from channels.security import Security
from channels.socket_endpoint import SocketEndpoint

if TYPE_CHECKING:
    from channels.tensors.devices import Device


class Echo(Message, frozen=True, tag="test_echo"):
    """A message that comes back."""

    number: int


def say(*words: object) -> None:
    print(*words, flush=True)


async def echo(endpoint: SocketEndpoint, options: argparse.Namespace) -> None:
    """Send everything back to whom it came from."""
    endpoint.on_message = endpoint.send
    say("ready")


async def double(endpoint: SocketEndpoint, options: argparse.Namespace) -> None:
    """Acknowledge each item with twice its payload."""
    consumer = ChannelRouter(endpoint).consumer("work", capacity=4)
    consumer.add_producer(options.peer)
    say("ready")
    while True:
        item = await consumer.get()
        item.ack(item.payload * 2)
        del item  # while we wait for the next, nothing of this one is held


async def hold(endpoint: SocketEndpoint, options: argparse.Namespace) -> None:
    """Take items and never finish them; say which, and when one is cancelled."""
    consumer = ChannelRouter(endpoint).consumer("work", capacity=4)
    consumer.add_producer(options.peer)
    say("ready")
    watches = []

    async def watch(item: Any) -> None:
        await item.wait_cancelled()
        say("cancelled", shown(item.payload))

    while True:
        item = await consumer.get()
        say("holds", shown(item.payload))
        watches.append(asyncio.create_task(watch(item)))


async def produce(endpoint: SocketEndpoint, options: argparse.Namespace) -> None:
    """Put items of a size; when all are acknowledged, say the most memory that this took (bytes), and the transport."""
    producer = ChannelRouter(endpoint).producer(
        "work", bound=1000, bound_bytes=options.bound_bytes, epoch=options.epoch
    )
    producer.add_consumer(options.peer)
    say("ready")
    before = peak_bytes()
    for number in range(options.items):
        data = array(options, options.size_bytes, number % 251)
        await producer.put({"epoch": options.epoch, "number": number, "data": data})
    await producer.drained()
    say("drained", peak_bytes() - before, endpoint.transport(options.peer).name)


async def send_large(endpoint: SocketEndpoint, options: argparse.Namespace) -> None:
    """Have one item acknowledged; then put a small and a large one, and say when they are on their way."""
    producer = ChannelRouter(endpoint).producer("work", bound=2)
    producer.add_consumer(options.peer)
    say("ready")
    await producer.call(array(options, 1 << 20, 1))  # from now on there is credit, and a way
    await producer.put("small")
    await producer.put(array(options, options.size_bytes, 1))
    asyncio.get_running_loop().call_soon(say, "sending")  # behind the channel's own flush


def array(options: argparse.Namespace, size_bytes: int, value: int) -> Any:
    """Bytes of one value, on the GPU where there is one."""
    if not options.gpu:
        return np.full(size_bytes, value, np.uint8)
    import torch

    device = "cuda" if options.gpu == "cuda" else "cpu"
    return torch.full((size_bytes,), value, dtype=torch.uint8, device=device)


def shown(payload: Any) -> str:
    """Text as it is, of an array its first element."""
    return payload if isinstance(payload, str) else str(int(payload[0]))


def gpu(name: str) -> "Device":
    """A real one, or one of files: its directory and uuid."""
    if name == "cuda":
        from channels.tensors.devices import CudaDevice

        return CudaDevice()
    from host_gpu import HostGpu

    directory, uuid = name.rsplit(":", 1)
    return HostGpu(Path(directory), uuid)


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def main(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    device: Callable[[], Device] | None = partial(gpu, options.gpu) if options.gpu else None
    endpoint = SocketEndpoint(
        options.name,
        options.address,
        security=None if options.key is None else Security(options.key),
        shared_dir=options.shared_dir,
        device=device,
        device_type="cuda" if options.gpu == "cuda" else "cpu",
    )
    if device is not None:
        array(options, 1, 0)  # what a GPU needs in a process is there before anything is measured
    endpoint.connect(options.peer, options.peer_address)
    say("at", endpoint.address)
    ended = loop.run_in_executor(None, sys.stdin.read)
    task = asyncio.create_task(globals()[options.role](endpoint, options))
    task.add_done_callback(report)
    await ended
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    endpoint.close()


def report(task: "asyncio.Task[None]") -> None:
    """A role that fails says so: whoever reads its stdout would wait for ever."""
    if not task.cancelled() and task.exception() is not None:
        say("raised", repr(task.exception()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for argument in ("role", "name", "address", "peer", "peer_address"):
        parser.add_argument(argument)
    parser.add_argument("--shared-dir", type=Path)
    parser.add_argument("--key", type=bytes.fromhex)  # of the cluster
    parser.add_argument("--gpu", default="", help="cuda, or DIRECTORY:UUID")
    parser.add_argument("--epoch", type=int, default=0)
    parser.add_argument("--items", type=int, default=10)
    parser.add_argument("--size-bytes", type=int, default=8)
    parser.add_argument("--bound-bytes", type=int, default=BOUND_BYTES)
    uvloop.run(main(parser.parse_args()))
