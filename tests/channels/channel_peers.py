"""What the channel tests share: webs of routers on every transport, and peers in other processes."""

import asyncio
import os
import secrets
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import PIPE, Forked
from host_gpu import HostGpu

from channels.channel import ChannelRouter, Consumer, Producer
from channels.endpoint import MAX_PAYLOAD_BYTES, Endpoint
from channels.inline import InlineHub
from channels.messages import Message
from channels.payload import Encoded
from channels.security import KEY_BYTES, Security
from channels.socket_endpoint import SocketEndpoint
from channels.tensors.device_messages import (
    DeviceAnswered,
    DeviceOffered,
    NcclAnswered,
    NcclOffered,
)
from channels.tensors.devices import CudaDevice, Device

DEADLINE_S = 30.0
SECURITY = Security(secrets.token_bytes(KEY_BYTES))
HOST_TRANSPORTS = ("ipc", "shared_memory", "tcp", "curve")
# Tensors on devices: on GPUs made of files, and on real ones.
DEVICE_TRANSPORTS = ("cuda_ipc", "nccl")
GPU_TRANSPORTS = tuple(
    pytest.param(
        f"{name} on GPUs",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs"),
        ],
    )
    for name, count in (("cuda_ipc", 1), ("nccl", 2))
)
TRANSPORTS = ("inline", *HOST_TRANSPORTS, *DEVICE_TRANSPORTS)
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


class Peer:
    """A child process that runs a role of `peer_process.py`."""

    def __init__(self, role: str, *args: str, **environment: str) -> None:
        script = Path(__file__).with_name("peer_process.py")
        self.process = Forked(
            script, role, *args, env=os.environ | environment, stdin=PIPE, stdout=PIPE
        )

    async def says(self) -> str:
        """The next line on its stdout, "" at its end."""
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        return line.strip()

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Let it end on its own."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=DEADLINE_S)
        finally:
            self.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


Start = Callable[..., Peer]


class LadenEndpoint(SocketEndpoint):
    """Every payload that it packs has a tensor on its device beside it, which arrives that way and whole.

    endpoints: of all names; GPUs are offered and answered for at once, so that the first tensor finds its way
    """

    def __init__(
        self,
        endpoints: dict[str, "LadenEndpoint"],
        kind: int,
        name: str,
        *args: Any,
        **options: Any,
    ) -> None:
        super().__init__(name, *args, **options)
        self._endpoints, self._kind = endpoints, kind
        self._loads = 0
        endpoints[name] = self

    def pack(self, tree: Any) -> Encoded:
        if isinstance(tree, Encoded):
            return tree
        self._loads += 1
        load = torch.full((16,), self._loads % 251, dtype=torch.uint8)
        return super().pack({"load": load, "number": self._loads % 251, "tree": tree})

    def _decode_payload(self, sender: str, frames: Sequence[Any], transfers: Any) -> Any:
        tree, loads = _unloaded(super()._decode_payload(sender, frames, transfers))
        if loads:
            assert frames[4].bytes.count(self._kind) == loads, "a tensor came another way"
        return tree

    def _tell(self, peer: str, message: Message) -> None:
        other = self._endpoints.get(peer)
        offers = DeviceOffered | DeviceAnswered | NcclOffered | NcclAnswered
        if other is not None and isinstance(message, offers):
            other._devices.received(self.name, message)
        else:
            super()._tell(peer, message)


def _unloaded(tree: Any) -> tuple[Any, int]:
    """What a batch's payloads were before `pack`, and how many tensors came with them."""
    if isinstance(tree, list):
        parts = [_unloaded(part) for part in tree]
        return [part for part, _ in parts], sum(loads for _, loads in parts)
    if isinstance(tree, dict) and "load" in tree:
        assert tree["load"].eq(tree["number"]).all()
        return tree["tree"], 1
    return tree, 0


class Web:
    """Routers that are all connected to each other, on one transport. Made in a running loop.

    laden: on devices, each payload has a tensor beside it, see LadenEndpoint
    """

    def __init__(
        self,
        transport: str,
        directory: Path,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        *,
        laden: bool = False,
    ) -> None:
        self.transport, _, on = transport.partition(" on ")
        self.real = on == "GPUs"
        self.on_devices = self.transport in DEVICE_TRANSPORTS
        self._laden: dict[str, LadenEndpoint] | None = {} if laden and self.on_devices else None
        self.load_bytes = 64 if self._laden is not None else 0  # at most, of one payload
        self.routers: dict[str, ChannelRouter] = {}
        self.shared = directory / "shared"  # of the arenas
        self._directory = directory
        self._max_payload_bytes = max_payload_bytes
        self._hub = InlineHub(max_payload_bytes=max_payload_bytes)
        self._count = 0

    def router(self, name: str) -> ChannelRouter:
        endpoint = self._endpoint(name)
        for other in self.routers.values():
            endpoint.connect(other.endpoint.name, other.endpoint.address)
            other.endpoint.connect(name, endpoint.address)
        self.routers[name] = ChannelRouter(endpoint)
        return self.routers[name]

    def pair(self, bound: int = 8, capacity: int = 4) -> tuple[Producer, Consumer]:
        """A producer "p" and a consumer "a" that know each other."""
        producer = self.router("p").producer("work", bound=bound)
        return producer, self.consumer("a", capacity)

    def consumer(self, name: str, capacity: int) -> Consumer:
        consumer = self.router(name).consumer("work", capacity=capacity)
        consumer.add_producer("p")
        self.routers["p"].producers["work"].add_consumer(name)
        return consumer

    async def join(
        self, start: Start, role: str, name: str, *options: str, of: str = "p", sees: str = ""
    ) -> Peer:
        """A process that plays a role, connected with the router `of`; it has said "ready".

        sees: real GPUs, by default another one than ours for NCCL
        """
        endpoint = self.routers[of].endpoint
        environment = {}
        if self.transport == "shared_memory":
            options = ("--shared-dir", str(self.shared), *options)
        if self.transport == "curve":
            options = ("--key", SECURITY.key.hex(), *options)
        if self.real:
            options = ("--gpu", "cuda", *options)
            sees = sees or ("1" if self.transport == "nccl" else "0")
            environment["CUDA_VISIBLE_DEVICES"] = sees
        elif self.on_devices:
            options = ("--gpu", f"{self._gpus}:{self._uuid(name)}", *options)
        peer = start(role, name, self._address(), of, endpoint.address, *options, **environment)
        endpoint.connect(name, (await peer.says()).removeprefix("at "))
        assert await peer.says() == "ready"
        return peer

    def lose(self, name: str, of: str = "p") -> None:
        """Tell a router that a process died, as flowd tells the actors that know it."""
        self.routers[of].remove_peer(name)
        self.routers[of].endpoint.disconnect(name)

    def array(self, size_bytes: int, value: int) -> Any:
        """Bytes of one value, where this transport has them."""
        if not self.on_devices:
            return np.full(size_bytes, value, np.uint8)
        return torch.full((size_bytes,), value, dtype=torch.uint8, device=self.device)

    @property
    def device(self) -> str:
        """Where device tensors of this process are."""
        return "cuda:0" if self.real else "cpu"

    def warm_up(self) -> None:
        """Have what a GPU needs in a process there, and nothing in torch's memory."""
        if self.real:
            self.array(1, 0)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def close(self) -> None:
        for router in self.routers.values():
            router.close()
            router.endpoint.close()

    def _endpoint(self, name: str) -> Endpoint:
        if self.transport == "inline":
            return self._hub.endpoint(name)
        options: dict[str, Any] = {"max_payload_bytes": self._max_payload_bytes}
        if self.transport == "shared_memory":
            options["shared_dir"] = self.shared
        if self.transport == "curve":
            options["security"] = SECURITY
        if self.on_devices:
            options["device"] = lambda: self._gpu(name)
            options["device_type"] = "cuda" if self.real else "cpu"
        if self._laden is not None:
            kind = 3 if self.transport == "cuda_ipc" else 4
            return LadenEndpoint(self._laden, kind, name, self._address(), **options)
        return SocketEndpoint(name, self._address(), **options)

    @property
    def _gpus(self) -> Path:
        return self._directory / "gpus"

    def _uuid(self, name: str) -> str:
        return "GPU-0" if self.transport == "cuda_ipc" else f"GPU-{name}"

    def _gpu(self, name: str) -> Device:
        return CudaDevice(0) if self.real else HostGpu(self._gpus, self._uuid(name))

    def _address(self) -> str:
        if self.transport in ("tcp", "curve", "nccl"):
            return "tcp://127.0.0.1:*"
        self._count += 1
        return f"ipc://{self._directory}/{self._count}"


MakeWeb = Callable[..., Web]


async def settle() -> None:
    """Let the loop turn until what was started has gone as far as it can without the network."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop, one turn at a time, until the condition holds; the fixture has the deadline."""
    for _ in iter(condition, True):
        await asyncio.sleep(0)


async def cancelled(task: "asyncio.Task[Any]") -> None:
    """Cancel a task, and wait for its end."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
