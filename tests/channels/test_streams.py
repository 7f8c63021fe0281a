"""Unix sockets on the loop: framing however the bytes come, loss and return of the other end, garbage."""

import asyncio
import logging
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
from channel_peers import Run
from hypothesis import given
from hypothesis import strategies as st

from channels.errors import TooLarge
from channels.sockets import Frame
from channels.streams import MAX_PARTS, LocalConnection, LocalMailbox

LIMIT = 64 << 20
Received = tuple[bytes, list[bytes]]


def listening(path: Path, limit: int = LIMIT) -> tuple[LocalMailbox, "asyncio.Queue[Received]"]:
    """A mailbox, and a queue of what comes."""
    queue: asyncio.Queue[Received] = asyncio.Queue()

    def received(frames: list[Frame]) -> None:
        name, *parts = (frame.bytes for frame in frames)
        queue.put_nowait((name, parts))

    return LocalMailbox(str(path), received, limit), queue


def framed(*parts: bytes) -> bytes:
    """A message as the module's docstring says it travels."""
    lengths = struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts))
    return lengths + b"".join(parts)


def dial(path: Path) -> socket.socket:
    """A connection that says what the test wants."""
    dialled = socket.socket(socket.AF_UNIX)
    dialled.connect(str(path))
    return dialled


def test_messages_of_all_sizes_arrive_in_order(run: Run, sockets: Path) -> None:
    """Around what is joined, what is read at once and what a socket holds; empty parts too."""
    sizes = (0, 1, 65535, 65536, 65537, 262143, 262144, 300_000, 3_000_000, 0, 5)
    sent = [[b"", bytes([n]) * size, b"x" * n] for n, size in enumerate(sizes)]

    async def main() -> None:
        mailbox, queue = listening(sockets / "m")
        connection = LocalConnection(mailbox.path, b"me")
        for parts in sent:
            connection.send(parts)
        for parts in sent:
            assert await queue.get() == (b"me", parts)
        connection.close()
        mailbox.close()

    run(main)
    assert list(sockets.iterdir()) == []


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=30))
def test_framing_does_not_depend_on_how_the_bytes_come(cuts: list[int]) -> None:
    """Every cut of the same stream, in the middle of lengths as well, gives the same messages."""
    messages = [[b"a"], [b"", b"bc" * 40], [b"d" * 70_000, b"", b"e" * 3], [b"f" * 30_000] * 3]
    stream = framed(b"me") + b"".join(framed(*parts) for parts in messages)

    async def main(folder: str) -> None:
        mailbox, queue = listening(Path(folder) / "m")
        dialled = dial(Path(folder) / "m")
        position = 0
        for cut in [*cuts, len(stream)]:
            await asyncio.to_thread(dialled.sendall, stream[position : position + cut])
            position += cut
        for parts in messages:
            assert await queue.get() == (b"me", parts)
        dialled.close()
        mailbox.close()

    with tempfile.TemporaryDirectory(prefix="ch-") as folder:
        asyncio.run(main(folder))


def test_what_was_sent_before_anyone_listens_arrives(run: Run, sockets: Path) -> None:
    """In order, with what follows."""

    async def main() -> None:
        connection = LocalConnection(str(sockets / "m"), b"me")
        connection.send([b"1"])
        connection.send([b"2" * 100_000])
        mailbox, queue = listening(sockets / "m")
        connection.send([b"3"])
        for parts in ([b"1"], [b"2" * 100_000], [b"3"]):
            assert await queue.get() == (b"me", parts)
        connection.close()
        mailbox.close()

    run(main)


def test_next_one_at_the_path_gets_the_cut_message_whole(run: Run, sockets: Path) -> None:
    """A process that dies while it reads loses what it read, the next starts with that message."""

    async def main() -> None:
        dying = socket.socket(socket.AF_UNIX)
        dying.bind(str(sockets / "m"))
        dying.listen()
        connection = LocalConnection(str(sockets / "m"), b"me")
        large = bytes(range(256)) * 16384
        connection.send([b"1", large])
        connection.send([b"2"])
        accepted, _ = await asyncio.to_thread(dying.accept)
        assert len(await asyncio.to_thread(accepted.recv, 100_000)) > 100
        accepted.close()
        dying.close()
        mailbox, queue = listening(sockets / "m")  # takes the stale path over
        assert await queue.get() == (b"me", [b"1", large])
        assert await queue.get() == (b"me", [b"2"])
        connection.close()
        mailbox.close()

    run(main)


def test_half_a_message_of_a_dead_sender_is_never_seen(run: Run, sockets: Path) -> None:
    """Neither of a small one nor of a large one; others go on."""

    async def main() -> None:
        mailbox, queue = listening(sockets / "m")
        for size in (100, 1_000_000):
            dialled = dial(sockets / "m")
            half = framed(b"dead") + framed(b"x" * size)[: size // 2]
            await asyncio.to_thread(dialled.sendall, half)
            dialled.close()
        connection = LocalConnection(mailbox.path, b"me")
        connection.send([b"alive"])
        assert await queue.get() == (b"me", [b"alive"])
        assert queue.empty()
        connection.close()
        mailbox.close()

    run(main)


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (struct.pack("<I", 0), "0 parts"),
        (struct.pack("<I", MAX_PARTS + 1), f"{MAX_PARTS + 1} parts"),
        (struct.pack("<IQ", 1, 1001), "1001 bytes"),
        (struct.pack("<IQQ", 2, 2**63, 2**63), f"{2**64} bytes"),
    ],
)
def test_garbage_ends_its_own_connection_only(
    sockets: Path, caplog: pytest.LogCaptureFixture, garbage: bytes, why: str
) -> None:
    """It is logged with what was wrong, and nothing is allocated for it."""

    async def main() -> None:
        mailbox, queue = listening(sockets / "m", limit=1000)
        connection = LocalConnection(mailbox.path, b"me")
        dialled = dial(sockets / "m")
        dialled.sendall(framed(b"rogue") + garbage)
        assert await asyncio.to_thread(dialled.recv, 1) == b""
        dialled.close()
        connection.send([b"alive"])
        assert await asyncio.wait_for(queue.get(), 10) == (b"me", [b"alive"])
        connection.close()
        mailbox.close()

    with caplog.at_level(logging.WARNING, "channels.streams"):
        asyncio.run(main())
    assert [why in record.getMessage() for record in caplog.records] == [True]


def test_too_many_parts_are_refused_at_the_sender(run: Run, sockets: Path) -> None:
    """The receiver would end the connection for them."""

    async def main() -> None:
        connection = LocalConnection(str(sockets / "m"), b"me")
        with pytest.raises(TooLarge, match=str(MAX_PARTS)):
            connection.send([b""] * (MAX_PARTS + 1))
        connection.close()

    run(main)


def test_close_lets_what_was_sent_leave(run: Run, sockets: Path) -> None:
    """More than a socket holds, beyond the life of the connection."""

    async def main() -> None:
        mailbox, queue = listening(sockets / "m")
        connection = LocalConnection(mailbox.path, b"me")
        connection.send([b"x" * 8_000_000])
        connection.send([b"farewell"])
        connection.close(linger_ms=10_000)
        assert len((await queue.get())[1][0]) == 8_000_000
        assert (await queue.get())[1] == [b"farewell"]
        mailbox.close()

    run(main)


def test_handler_may_close_the_mailbox(run: Run, sockets: Path) -> None:
    """What came with the same read is not delivered any more."""

    async def main() -> None:
        seen: list[Any] = []
        closed = asyncio.Event()

        def received(frames: list[Frame]) -> None:
            seen.append([frame.bytes for frame in frames])
            mailbox.close()
            closed.set()

        mailbox = LocalMailbox(str(sockets / "m"), received, LIMIT)
        dialled = dial(sockets / "m")
        dialled.sendall(framed(b"me") + framed(b"1") + framed(b"2"))
        await closed.wait()
        await asyncio.to_thread(dialled.close)
        assert seen == [[b"me", b"1"]]

    run(main)
