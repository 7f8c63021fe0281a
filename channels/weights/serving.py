"""A node's host copy for other nodes: the side that has the versions.

    server = WeightsServer(endpoint, directory)
    server.received(sender, message)          # each ForServer message of the endpoint
    server.peer_gone(peer)                    # a fetcher died

Any process of the node may serve, the trainer's as well as another one after it: what is served is the directory.
A file that is being sent is held against re-use, as by any reader; one that no longer exists is answered so, and the
fetcher asks for the newest again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from channels.endpoint import Endpoint
from channels.errors import BadFrame, ChannelError, WeightsMismatch
from channels.messages import Message
from channels.weights.directory import WeightsDirectory
from channels.weights.exchange import (
    BUCKET_BYTES,
    NUM_BUCKETS,
    TIMEOUT_S,
    ForServer,
    WeightsAsked,
    WeightsBytes,
    WeightsBytesTaken,
    WeightsFile,
    WeightsFileAsked,
    WeightsNewest,
    WeightsNotThere,
)
from channels.weights.files import Borrowed
from channels.weights.layout import lay_out
from channels.weights.sharded import Outline
from channels.weights.shards import Box, intersect, numel, shape_of, whole, within
from channels.weights.threads import in_thread

log = logging.getLogger(__name__)


@dataclass
class _Sending:
    """A file on its way to one fetcher."""

    request: int
    task: "asyncio.Task[None] | None" = None
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(NUM_BUCKETS))


class WeightsServer:
    """See the module docstring. On the loop; what blocks goes to threads.

    timeout_s: a fetcher that takes nothing for so long is given up, so that it holds no version
    """

    def __init__(
        self, endpoint: Endpoint, directory: WeightsDirectory, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._endpoint = endpoint
        self._directory = directory
        self._timeout_s = timeout_s
        self._sending: dict[str, _Sending] = {}  # by peer
        self.bytes_sent = 0  # of tensors

    def received(self, sender: str, message: ForServer) -> None:
        """Take what a fetcher said."""
        match message:
            case WeightsAsked():
                self._send(sender, self._newest(message))
            case WeightsFileAsked():
                self.peer_gone(sender)  # a fetcher wants one file at a time
                sending = self._sending[sender] = _Sending(message.request)
                sending.task = asyncio.create_task(self._serve(sender, message, sending))
            case WeightsBytesTaken():
                known = self._sending.get(sender)
                if known is not None and known.request == message.request:
                    known.room.release()

    def peer_gone(self, peer: str) -> None:
        """Stop sending to it."""
        sending = self._sending.pop(peer, None)
        if sending is not None and sending.task is not None:
            sending.task.cancel()

    async def close(self) -> None:
        """Stop sending."""
        tasks = [sending.task for sending in self._sending.values() if sending.task is not None]
        for peer in list(self._sending):
            self.peer_gone(peer)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _newest(self, asked: WeightsAsked) -> WeightsNewest:
        newest = self._directory.newest()
        if newest is None:
            return WeightsNewest(request=asked.request, version=None)
        variant, base = newest.variant, newest.base
        if variant == "full" and asked.held is not None:
            if self._directory.has_delta(newest.version, asked.held):
                variant, base = "delta", asked.held
        return WeightsNewest(
            request=asked.request, version=newest.version, variant=variant, base=base
        )

    async def _serve(self, peer: str, asked: WeightsFileAsked, sending: _Sending) -> None:
        try:
            await self._send_file(peer, asked, sending)
        except (ChannelError, OSError, TimeoutError) as error:
            # Also BadFrame and WeightsMismatch: it asked for what is not in the file.
            log.warning("weights not sent peer=%s version=%s: %r", peer, asked.version, error)
            self._send(peer, WeightsNotThere(request=asked.request, reason=str(error)))
        finally:
            if self._sending.get(peer) is sending:
                del self._sending[peer]

    async def _send_file(self, peer: str, asked: WeightsFileAsked, sending: _Sending) -> None:
        lend = self._directory.lend
        opened = await in_thread(lend, asked.version, asked.held, undo=Borrowed.close)
        with opened as file:
            parts = _parts(file, asked.parts)
            layout = lay_out(
                {n: Outline(file.layout.places[n].dtype, shape_of(b)) for n, b in parts.items()},
                file.layout.metadata,
            )
            self._send(
                peer,
                WeightsFile(
                    request=asked.request, header=layout.header, size_bytes=layout.size_bytes
                ),
            )
            index, left = 0, layout.size_bytes - len(layout.header)
            data = _buckets(file, {name: parts[name] for name in layout.places})
            async for bucket in data:
                await self._wait_room(sending)
                sent = sum(array.nbytes for array in bucket)
                left -= sent
                message = WeightsBytes(request=asked.request, index=index, last=not left)
                self._send(peer, message, bucket)
                self.bytes_sent += sent
                index += 1
            for _ in range(NUM_BUCKETS):  # all have been taken: the file may be written over
                await self._wait_room(sending)

    async def _wait_room(self, sending: _Sending) -> None:
        async with asyncio.timeout(self._timeout_s):
            await sending.room.acquire()

    def _send(self, peer: str, message: Message, payload: Any = None) -> None:
        try:
            self._endpoint.send(peer, message, payload)
        except ChannelError as error:
            log.debug("peer=%s was not answered: %s", peer, error)


def _parts(file: Borrowed, asked: dict[str, Box] | None) -> dict[str, Box]:
    """The box of each tensor that is to be sent."""
    places = file.layout.places
    if asked is None:
        return {name: whole(place.shape) for name, place in places.items()}
    for name, box in asked.items():
        if name not in places:
            raise WeightsMismatch(f"{name} is no tensor of this version")
        shape = places[name].shape
        if len(box) != len(shape) or (numel(box) and intersect(box, whole(shape)) != box):
            raise BadFrame(f"{name} has shape {shape}, so there is no part {box} of it")
    return asked


async def _buckets(file: Borrowed, parts: dict[str, Box]) -> AsyncIterator[list[Any]]:
    """The bytes of these parts, one after the other, as lists of arrays; views of the file where they lie so."""
    import torch

    bucket: list[Any] = []
    room, count = BUCKET_BYTES, 0
    for name, box in parts.items():
        tensor = file.tensors[name]
        part = tensor[within(box, whole(tensor.shape))]
        if not part.is_contiguous():
            part = await in_thread(part.contiguous)
        flat = part.reshape(-1).view(torch.uint8).numpy()
        start = 0
        while start < flat.size:
            piece = flat[start : start + room]
            bucket.append(piece)
            start += piece.size
            room -= piece.size
            if not room:
                yield bucket
                bucket, room, count = [], BUCKET_BYTES, count + 1
    if bucket or not count:  # a file without any bytes is one bucket too
        yield bucket
