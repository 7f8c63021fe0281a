"""The entry of an actor process: decode the spec, open the mailbox, live, leave with an exit code."""

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from actors.host import ActorHost
from channels.lifecycle import ActorSpec
from channels.socket_endpoint import SocketEndpoint

if TYPE_CHECKING:
    from channels.tensors.devices import Device

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def run(argument: bytes) -> int:
    """Called in the fresh process with the MessagePack of an ActorSpec; returns the process's exit code."""
    spec = msgspec.msgpack.decode(argument, type=ActorSpec)
    # For a torch that is loaded later (`python = …` starts cold): what the user's shell says is about other programs.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(spec.threads)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_main(spec))


async def _main(spec: ActorSpec) -> int:
    on_gpu = any(device.startswith("cuda") for device in spec.devices)
    endpoint = SocketEndpoint(
        spec.peer,
        spec.address,
        listen=spec.listen,
        security=spec.security,
        shared_dir=Path(spec.weights_dir),
        device=_gpu if on_gpu else None,
    )
    host = ActorHost(spec, endpoint)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, host.stop, signal.Signals(number).name)
    try:
        return await host.main()
    finally:
        endpoint.close()


def _gpu() -> "Device":
    from channels.tensors.devices import CudaDevice

    return CudaDevice()
