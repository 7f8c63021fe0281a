"""Device tensors through endpoints that CUDA IPC does not connect: in order, and no link that fails loses one."""

import asyncio
import gc
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_peers import Run, settle, until
from device_fakes import FakeDevice, FakeNode, FakePair

from channels.messages import Message
from channels.security import KEY_BYTES, Security
from channels.socket_endpoint import SocketEndpoint
from channels.tensors.device_frames import ON_DEVICE_FROM_BYTES
from channels.tensors.nccl_frames import RETRY_S, NcclFrames

ELEMENTS = ON_DEVICE_FROM_BYTES // 2


class Take(Message, frozen=True, tag="test_take_over_nccl"):
    """Here is a tensor. channel: in whose order"""

    channel: str = "work"


class Pair:
    """Two endpoints with a GPU each, a and b, on two nodes unless there is a directory for their sockets."""

    def __init__(self, sockets: Path | None = None, security: Security | None = None) -> None:
        self.node = FakeNode()
        self.gpus = {name: FakeDevice(self.node, f"GPU-{name}") for name in "ab"}
        self.a, self.b = (
            SocketEndpoint(
                name,
                "tcp://127.0.0.1:*" if sockets is None else f"ipc://{sockets}/{name}",
                device=lambda name=name: self.gpus[name],  # type: ignore[misc]
                device_type="cpu",
                security=security,
            )
            for name in "ab"
        )
        self.a.connect("b", self.b.address)
        self.b.connect("a", self.a.address)
        self.box: asyncio.Queue[Any] = asyncio.Queue()
        self.b.on_message = lambda _, message, tree: self.box.put_nowait(tree)

    def send(self, tree: Any, channel: str = "work") -> None:
        self.a.send("b", Take(channel=channel), tree)

    async def arrives(self, value: float) -> None:
        """The next payload is a tensor of this value."""
        tensor = await self.box.get()
        assert tensor.shape == (2, ELEMENTS // 2)
        assert tensor.dtype == torch.bfloat16
        assert tensor.eq(value).all()

    async def answered(self) -> None:
        """The first tensor went through the host, and b has said whether it takes more over NCCL."""
        self.send(tensor(0))
        await self.arrives(0)
        way = self.a._devices.way
        await until(lambda: way("b", near=self.a.address.startswith("ipc")) is not None)

    @property
    def nccl(self) -> NcclFrames:
        """The sender's."""
        nccl = self.a._devices._nccl
        assert nccl is not None
        return nccl

    @property
    def pair(self) -> FakePair:
        """The newest link."""
        return list(self.node.fabric.pairs.values())[-1]

    async def at_rest(self) -> None:
        """Nothing is kept at the sender."""
        await until(lambda: not self.nccl._peers["b"].held)

    def close(self) -> None:
        self.a.close()
        self.b.close()
        assert all(each.aborted.is_set() for each in self.node.fabric.communicators)


def tensor(value: float) -> torch.Tensor:
    return torch.full((2, ELEMENTS // 2), value, dtype=torch.bfloat16)


def on_pair(run: Run, main: Callable[[Pair], Any], sockets: Path | None = None) -> None:
    """Run a test with a pair, and close it."""

    async def guarded() -> None:
        pair = Pair(sockets)
        await main(pair)
        pair.close()

    run(guarded)


def test_tensors_go_over_nccl_once_the_peer_said_that_it_takes_them(run: Run) -> None:
    """The first through the host; several in one message, beside small ones; nothing is kept once they arrived."""

    async def main(pair: Pair) -> None:
        assert pair.a.transport("b").name == "tcp"
        await pair.answered()
        name, why = pair.a.transport("b")
        assert name == "nccl"
        assert "so it may be on another node" in why
        pair.send({"x": [tensor(1), tensor(2)], "small": torch.arange(3)})
        tree = await pair.box.get()
        assert [each[0, 0].item() for each in tree["x"]] == [1, 2]
        assert torch.equal(tree["small"], torch.arange(3))
        links = pair.nccl._links
        assert links is not None
        await pair.at_rest()
        await until(lambda: links.statistics()["to b"]["bytes"] == 4 * ELEMENTS)
        sent = tensor(3)
        seen = weakref.ref(sent)
        pair.send(sent)
        del sent
        await pair.arrives(3)
        await pair.at_rest()
        gc.collect()
        await until(lambda: seen() is None)

    on_pair(run, main)


def test_a_message_waits_for_its_tensor_and_later_ones_of_its_channel_for_it(run: Run) -> None:
    """As for frames in chunks; other channels pass by."""

    async def main(pair: Pair) -> None:
        await pair.answered()
        pair.send(tensor(1))
        await pair.arrives(1)
        pair.pair.stuck = True
        pair.send(tensor(2))
        pair.send("after")
        pair.send("aside", channel="other")
        assert await pair.box.get() == "aside"
        await settle()
        assert pair.box.empty()
        pair.pair.stuck = False
        pair.pair.match()
        await pair.arrives(2)
        assert await pair.box.get() == "after"

    on_pair(run, main)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda pair: setattr(pair.gpus["b"], "uuid", "GPU-a"), "on the same GPU, GPU-a"),
        (
            lambda pair: setattr(pair.gpus["b"].library, "version", 22705),
            r"a has NCCL 2\.28\.9 and b 2\.27\.5: install the same torch",
        ),
        (lambda pair: setattr(pair.gpus["b"], "library", None), "NCCL cannot be loaded"),
        (lambda pair: setattr(pair.gpus["a"], "library", None), "NCCL cannot be loaded"),
        (lambda pair: setattr(pair.b._devices, "_useless", "b has no GPU"), "b has no GPU"),
    ],
)
def test_where_nccl_cannot_be_had_tensors_go_through_the_host(
    run: Run, spoil: Callable[[Pair], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """`transport` says why; every tensor arrives, and nothing is connected."""

    async def main(pair: Pair) -> None:
        spoil(pair)
        await pair.answered()
        name, said = pair.a.transport("b")
        assert name == "tcp"
        assert re.search(f"device tensors through the host: .*{why}", said)
        for value in range(1, 4):
            pair.send(tensor(value))
            await pair.arrives(value)
        assert not pair.node.fabric.communicators

    with caplog.at_level(logging.WARNING):
        on_pair(run, main)


def test_what_the_receiver_has_no_room_for_comes_through_the_host(run: Run) -> None:
    """In its place in the order; NCCL is asked again some minutes later."""

    async def main(pair: Pair) -> None:
        await pair.answered()
        library = pair.gpus["b"].library
        assert library is not None
        library.memory_bytes = ELEMENTS
        for value in range(1, 6):
            pair.send(tensor(value))
        for value in range(1, 6):
            await pair.arrives(value)
        await pair.at_rest()
        name, why = pair.a.transport("b")
        assert name == "tcp"
        assert f"NCCL failed: a tensor from a: no room for {2 * ELEMENTS} bytes at b" in why
        library.memory_bytes = 1 << 30
        pair.send(tensor(6))
        await pair.arrives(6)
        assert pair.a.transport("b").name == "tcp"
        now = pair.nccl._clock()
        pair.nccl._clock = lambda: now + RETRY_S
        await pair.answered()
        await until(lambda: pair.a.transport("b").name == "nccl")
        pair.send(tensor(7))
        await pair.arrives(7)

    on_pair(run, main)


@pytest.mark.parametrize("near", [True, False])
def test_a_link_that_fails_under_way_loses_nothing(run: Run, sockets: Path, near: bool) -> None:
    """What it had not brought comes through the host, over TCP or the socket; what it had is not sent twice."""

    async def main(pair: Pair) -> None:
        pair.node.apart |= {"GPU-a", "GPU-b"}
        await pair.answered()
        await pair.answered()  # on one node, CUDA IPC is asked first
        await until(lambda: pair.a.transport("b").name == "nccl")
        if near:
            assert "CUDA IPC does not: GPU GPU-a of a cannot" in pair.a.transport("b").why
        pair.send(tensor(1))
        await pair.arrives(1)
        pair.pair.stuck = True
        for value in range(2, 6):
            pair.send(tensor(value))
        pair.pair.broken = "remote process exited"
        for value in range(2, 6):
            await pair.arrives(value)
        await pair.at_rest()
        assert "NCCL failed: a tensor from a: " in pair.a.transport("b").why
        assert pair.box.empty()
        assert not pair.b._incoming._whole.get("a")

    on_pair(run, main, sockets if near else None)


@pytest.mark.parametrize("survivor", ["sender", "receiver"])
def test_a_peer_that_is_gone_leaves_nothing_behind(run: Run, survivor: str) -> None:
    """Tensors that were on their way are let go of at once, and messages that waited for them are dropped."""

    async def main(pair: Pair) -> None:
        await pair.answered()
        pair.send(tensor(1))
        await pair.arrives(1)
        pair.pair.stuck = True
        sent = tensor(2)
        seen = weakref.ref(sent)
        pair.send(sent)
        pair.send("after")
        del sent
        assert pair.b._devices._nccl is not None
        arriving = pair.b._devices._nccl._peers
        await until(lambda: bool(arriving["a"].arriving))
        if survivor == "sender":
            pair.a.disconnect("b")
            gc.collect()
            await until(lambda: seen() is None)
            pair.a.connect("b", pair.b.address)
        else:
            pair.b.disconnect("a")
            assert not pair.b._incoming.holds("a")
            pair.b.connect("a", pair.a.address)
            pair.a.disconnect("b")
            pair.a.connect("b", pair.b.address)
        pair.send(tensor(3), channel="new")
        await pair.arrives(3)
        await until(lambda: pair.a.transport("b").name == "nccl")
        pair.send(tensor(4), channel="new")
        await pair.arrives(4)
        assert pair.box.empty()

    on_pair(run, main)


@pytest.mark.parametrize("plain_bulk", [False, True])
def test_between_nodes_only_where_bulk_may_be_in_the_clear(run: Run, plain_bulk: bool) -> None:
    """NCCL enciphers nothing: unless the cluster's owner allows that, device tensors go through the host."""

    async def main() -> None:
        pair = Pair(security=Security(bytes(KEY_BYTES), plain_bulk))
        await pair.answered()
        assert pair.a.transport("b").name == ("nccl" if plain_bulk else "tcp (curve)")
        pair.send(tensor(1))
        await pair.arrives(1)
        assert bool(pair.node.fabric.pairs) == plain_bulk
        if plain_bulk:
            await pair.at_rest()
        pair.close()

    run(main)
