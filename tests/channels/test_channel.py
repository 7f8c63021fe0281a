"""What channels do with payloads that cannot be sent, or not be read."""

import asyncio
from pathlib import Path

import pytest
from channel_peers import Run, Web

from channels import payload
from channels.errors import ChannelError, Refused, TooLarge


def test_payload_that_cannot_travel_is_refused_at_put_and_ack(run: Run, sockets: Path) -> None:
    """The error is raised where the mistake is, the slot is free, and the item can still be finished."""

    async def main() -> None:
        w = Web("ipc", sockets, max_payload_bytes=9000)
        producer, consumer = w.pair(bound=1)
        for _ in range(3):
            with pytest.raises(TypeError, match="object"):
                await producer.put(object())
            with pytest.raises(TooLarge, match="over the limit of 9000"):
                await producer.put(bytes(10_000))
        call = asyncio.create_task(producer.call("x"))
        item = await consumer.get()
        with pytest.raises(TypeError, match="object"):
            item.ack(object())
        with pytest.raises(TypeError, match="object"):
            item.hand_back(object())
        assert not item.finished
        item.ack("fine")
        assert await call == "fine"
        with pytest.raises(ChannelError, match="finished before"):
            item.ack()
        w.close()

    run(main)


def test_item_that_the_consumer_cannot_read_fails_its_call(
    run: Run, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller gets Refused with the reason, one get raises, and the channel goes on."""

    async def main() -> None:
        w = Web("ipc", sockets)
        producer, consumer = w.pair()
        monkeypatch.setattr(
            w.routers["p"].endpoint,
            "pack",
            lambda tree: (
                payload.Encoded(b"\xc1", b"", []) if tree == "bad" else payload.encode(tree)
            ),
        )
        with pytest.raises(Refused, match='a could not read an item of channel "work"'):
            await producer.call("bad")
        with pytest.raises(ChannelError, match="not a payload"):
            await consumer.get()
        call = asyncio.create_task(producer.call("good"))
        (await consumer.get()).ack(1)
        assert await call == 1
        w.close()

    run(main)
