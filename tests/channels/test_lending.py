"""Device tensors through endpoints: asked first, lent, returned; through the host where a GPU is out of reach."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_peers import Run, until
from device_fakes import FakeDevice, FakeNode

from channels.channel import ChannelRouter
from channels.messages import Message
from channels.socket_endpoint import SocketEndpoint
from channels.tensors.device_frames import ON_DEVICE_FROM_BYTES
from channels.tensors.errors import DeviceError

ELEMENTS = ON_DEVICE_FROM_BYTES // 2


class Take(Message, frozen=True, tag="test_take_on_device"):
    """Here is a tensor."""


class Pair:
    """Two endpoints of one node, each with a view of a GPU, or none."""

    def __init__(self, sockets: Path, receiver_uuid: str | None = "GPU-0") -> None:
        self.node = FakeNode()
        self.sender_gpu = FakeDevice(self.node)
        self.receiver_gpu = FakeDevice(self.node, receiver_uuid or "")
        shared_dir = sockets / "shared"
        self.a = SocketEndpoint(
            "a",
            f"ipc://{sockets}/a",
            shared_dir=shared_dir,
            device=lambda: self.sender_gpu,
            device_type="cpu",
        )
        device = (lambda: self.receiver_gpu) if receiver_uuid else None
        self.b = SocketEndpoint(
            "b", f"ipc://{sockets}/b", shared_dir=shared_dir, device=device, device_type="cpu"
        )
        self.a.connect("b", self.b.address)
        self.b.connect("a", self.a.address)
        self.box: asyncio.Queue[Any] = asyncio.Queue()
        self.b.on_message = lambda _, message, tree: self.box.put_nowait(tree)

    async def sent(self, tree: Any) -> Any:
        self.a.send("b", Take(), tree)
        return await self.box.get()

    async def answered(self) -> Any:
        """What the receiver said to the first offer, which the first tensor brought along."""
        await self.sent(torch.ones(ELEMENTS, dtype=torch.bfloat16))
        lending = self.a._devices._lending
        assert lending is not None
        await until(lambda: lending.reaches("b") is not None)
        return lending.reaches("b")

    @property
    def blocks(self) -> int:
        lending = self.a._devices._lending
        assert lending is not None
        return lending.num_blocks

    def close(self) -> None:
        self.a.close()
        self.b.close()


def test_tensors_stay_on_the_device_once_the_peer_said_that_it_reaches_it(
    run: Run, sockets: Path
) -> None:
    """The first goes through the host. Then the receiver sees the memory itself, and its block comes back."""

    async def main() -> None:
        pair = Pair(sockets)
        answer = await pair.answered()
        assert answer.reaches
        assert pair.a.transport("b").name == "cuda_ipc"
        await until(lambda: pair.blocks == 0)
        filled = pair.a.empty_on_device((2, ELEMENTS), torch.bfloat16)
        filled.fill_(3.0)
        seen = await pair.sent({"x": filled, "small": torch.arange(3), "part": filled[1]})
        assert seen["x"].shape == (2, ELEMENTS)
        assert seen["x"].dtype == torch.bfloat16
        assert torch.equal(seen["small"], torch.arange(3))
        filled[1, 0] = 4.0
        assert seen["x"][1, 0] == seen["part"][0] == 4.0
        assert pair.blocks == 1
        del filled, seen
        await until(lambda: pair.blocks == 0)
        pair.close()

    run(main)


def test_a_peer_without_a_gpu_gets_bytes(
    run: Run, sockets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the reason; every tensor arrives."""

    async def main() -> None:
        pair = Pair(sockets, None)
        answer = await pair.answered()
        assert not answer.reaches
        for number in range(3):
            seen = await pair.sent(torch.full((ELEMENTS,), number, dtype=torch.int32))
            assert seen.eq(number).all()
        why = "; device tensors through the host: b has no GPU"
        await until(lambda: pair.a.transport("b").why.endswith(why))
        await until(lambda: pair.blocks == 0)
        pair.close()

    with caplog.at_level(logging.WARNING):
        run(main)
    assert sum("go through the host: b has no GPU" in r.getMessage() for r in caplog.records) == 1


def test_a_sender_without_a_working_gpu_sends_bytes(
    run: Run, sockets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked for its GPU once."""

    async def main() -> None:
        def broken() -> FakeDevice:
            raise DeviceError("torch sees no GPU in this process")

        a = SocketEndpoint("a", f"ipc://{sockets}/a", device=broken, device_type="cpu")
        b = SocketEndpoint("b", f"ipc://{sockets}/b")
        a.connect("b", b.address)
        box: asyncio.Queue[Any] = asyncio.Queue()
        b.on_message = lambda _, message, tree: box.put_nowait(tree)
        for _ in range(2):
            a.send("b", Take(), torch.ones(ELEMENTS))
            assert (await box.get()).sum() == ELEMENTS
        assert a.empty_on_device((3,), torch.float32) is None
        a.close()
        b.close()

    with caplog.at_level(logging.WARNING):
        run(main)
    assert sum("sees no GPU" in r.getMessage() for r in caplog.records) == 1


def test_items_of_device_tensors_through_a_channel(run: Run, sockets: Path) -> None:
    """Call and result stay on the device; a consumer that leaves gives everything back."""

    async def main() -> None:
        pair = Pair(sockets)
        assert (await pair.answered()).reaches
        producer = ChannelRouter(pair.a).producer("work", bound=4, epoch=0)
        consumer = ChannelRouter(pair.b).consumer("work", capacity=4)
        producer.add_consumer("b")
        consumer.add_producer("a")
        for number in range(5):
            call = asyncio.create_task(producer.call(torch.full((ELEMENTS,), float(number))))
            item = await consumer.get()
            item.ack(item.payload * 2)
            del item
            assert (await call).eq(2.0 * number).all()
        await until(lambda: pair.blocks == 0)
        held = asyncio.create_task(producer.call(torch.ones(ELEMENTS)))
        item = await consumer.get()
        assert pair.blocks == 1
        pair.a.disconnect("b")
        producer.remove_consumer("b")
        assert pair.blocks == 1, "the item waits for another consumer"
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        del held
        await until(lambda: pair.blocks == 0)
        del item
        pair.close()

    run(main)
