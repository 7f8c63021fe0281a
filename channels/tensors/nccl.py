"""Device tensors to processes of other nodes, and to GPUs that CUDA IPC does not reach: over NCCL.

    links = NcclLinks("job/rollout-0", device.nccl(), post)      # both ends have one
    place, sent = links.send("job/trainer-0", tensor)            # the place goes into the message
    arriving = links.receive("job/rollout-0", place)             # at the other end, in the order of the messages
    tensor = await asyncio.wrap_future(arriving)

A link is a communicator of two ranks for one direction, made when first needed: both directions in one could each wait
for the other. Its unique id and a generation number travel in every place, so nothing is agreed upon beforehand and a
link that failed is never used again: the next tensor makes a new one. A link that had nothing to do for `idle_s` is
taken down; each costs some hundred MiB on both devices.

Order: tensors of a link arrive in the order of `send`; places must reach `receive` in that order too.
Loss: none. A tensor arrives whole, or its future fails with PeerLost at both ends that live.
Failure: `peer_gone` fails what is pending with that peer at once, and then aborts the communicator; so does a transfer
that takes longer than `deadline_s`, for peers whose end nobody noticed. No call waits for NCCL's own time-outs.
Memory: `send` holds the tensor until it has left; it must not be changed before `sent` is done. What arrives lies in
memory of torch's allocator. Nothing bounds what is in flight: channels do, by credits.
Two processes on one GPU cannot have a link, NCCL would hang: `channels.tensors.nccl_frames` asks before.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec
import torch

from channels.errors import BadFrame, Closed, PeerLost
from channels.tensors.device_messages import LinkClosed
from channels.tensors.devices import DeviceEvent
from channels.tensors.nccl_link import RECEIVER, SENDER, UNIQUE_ID_BYTES, Library, Link

log = logging.getLogger(__name__)

# Of device time that other work takes too; it is for peers that hang, and that nobody misses.
DEADLINE_S = 60.0
IDLE_S = 30.0
MAX_BYTES = 64 << 30  # of one tensor; more than that is a damaged place


class NcclPlace(msgspec.Struct, frozen=True, array_like=True):
    """Sender to receiver, in place of the bytes: the sequence-th tensor of a link."""

    unique_id: bytes
    generation: int
    sequence: int
    nbytes: int


class NcclLinks:
    """All links of a process on one GPU. `send`, `receive`, `closed`, `peer_gone` and `close` belong to the loop.

    post: sends a message to a peer; called from any thread
    max_bytes: of one tensor that is received
    """

    def __init__(
        self,
        name: str,
        library: Library,
        post: Callable[[str, LinkClosed], None],
        *,
        max_bytes: int = MAX_BYTES,
        idle_s: float = IDLE_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.name, self.library = name, library
        self._post = post
        self._max_bytes, self._idle_s, self._deadline_s = max_bytes, idle_s, deadline_s
        # Larger than any of a process that had this name before.
        self._generation = time.time_ns()
        self._outgoing: dict[str, Link] = {}
        self._incoming: dict[str, Link] = {}
        self._finishing: list[Link] = []  # replaced by newer ones, and perhaps not at their end
        self._closed = False

    def send(
        self, peer: str, tensor: torch.Tensor, after: DeviceEvent | None = None
    ) -> "tuple[bytes, Future[torch.Tensor]]":
        """Send a contiguous tensor of this GPU after an event, by default what the current stream has to do.

        Returns the place, for the message, and what is done when the tensor has left.
        """
        if self._closed:
            raise Closed(f"the NCCL links of {self.name} are closed")
        if not tensor.is_contiguous() or tensor.device != self.library.device or not tensor.nbytes:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} cannot be sent from "
                f"{self.library.device}: make it contiguous there, and leave out empty ones"
            )
        after = after or self.library.now()
        while True:
            link = self._outgoing.get(peer) or self._open(peer)
            sequence = link.sequence
            future = link.transfer(tensor, after)
            if future is not None:
                break
            del self._outgoing[peer]  # it failed, or was idle: the next generation serves
        place = NcclPlace(link.unique_id, link.generation, sequence, tensor.nbytes)
        return msgspec.msgpack.encode(place), future

    def receive(self, sender: str, place: bytes | memoryview) -> "Future[torch.Tensor]":
        """What will have the tensor, uint8, on this GPU, when all of it is there; PeerLost if it cannot come.

        Raises BadFrame for bytes that are no place.
        """
        if self._closed:
            raise Closed(f"the NCCL links of {self.name} are closed")
        where = self._decoded(place)
        link = self._incoming.get(sender)
        if link is None or where.generation > link.generation:
            if link is not None:
                link.finish()
                self._finishing = [each for each in self._finishing if each.reason is None]
                self._finishing.append(link)
            link = self._accept(sender, where)
        if where.generation < link.generation or link.reason is not None:
            return _lost(sender, link.reason or "its link is over")
        if where.sequence != link.sequence or where.unique_id != link.unique_id:
            # The device pairs sends and receives by order alone.
            return self._fail(link, f"tensor {where.sequence} came where {link.sequence} was next")
        try:
            tensor = self.library.empty(where.nbytes)
        except torch.OutOfMemoryError:
            return self._fail(link, f"no room for {where.nbytes} bytes at {self.name}")
        return link.transfer(tensor) or _lost(sender, link.reason)

    def closed(self, sender: str, message: LinkClosed) -> None:
        """The other end of a link says that it is over."""
        links = self._incoming if message.outgoing else self._outgoing
        link = links.get(sender)
        if link is None or link.generation != message.generation:
            return
        if message.reason:
            link.end(f"the other end failed: {message.reason}")
        else:
            link.finish()  # after what is still on its way to us

    def peer_gone(self, peer: str) -> None:
        """A peer died, or was disconnected: fail what is pending with it."""
        gone = [link for link in self._links() if link.peer == peer]
        for links in (self._outgoing, self._incoming):
            links.pop(peer, None)
        for link in gone:
            link.end("the process is gone")

    def statistics(self) -> dict[str, dict[str, Any]]:
        """By link: bytes that went through, and transfers that are not done."""
        return {
            f"{route} {peer}": {"bytes": link.bytes_done, "pending": link.pending}
            for route, links in (("to", self._outgoing), ("from", self._incoming))
            for peer, link in links.items()
            if link.reason is None
        }

    def close(self, timeout_s: float = 1.0) -> None:
        """Fail what is pending, and give the communicators this time to go."""
        self._closed = True
        links = self._links()
        for link in links:
            link.end(f"{self.name} was closed")
        deadline = time.monotonic() + timeout_s
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))

    def _decoded(self, place: bytes | memoryview) -> NcclPlace:
        try:
            where = msgspec.msgpack.decode(place, type=NcclPlace)
        except msgspec.DecodeError as error:
            raise BadFrame(f"not a tensor of an NCCL link: {error}") from error
        if (
            len(where.unique_id) != UNIQUE_ID_BYTES
            or where.generation < 0
            or where.sequence < 0
            or not 0 < where.nbytes <= self._max_bytes
        ):
            raise BadFrame(
                f"not a tensor of an NCCL link: id of {len(where.unique_id)} bytes, generation "
                f"{where.generation}, sequence {where.sequence}, {where.nbytes} bytes of at most "
                f"{self._max_bytes}"
            )
        return where

    def _links(self) -> list[Link]:
        return [*self._outgoing.values(), *self._incoming.values(), *self._finishing]

    def _open(self, peer: str) -> Link:
        self._generation += 1
        unique_id = self.library.unique_id()
        link = self._link(peer, unique_id, self._generation, SENDER)
        self._outgoing[peer] = link
        return link

    def _accept(self, sender: str, where: NcclPlace) -> Link:
        link = self._link(sender, where.unique_id, where.generation, RECEIVER)
        self._incoming[sender] = link
        return link

    def _link(self, peer: str, unique_id: bytes, generation: int, rank: int) -> Link:
        link = Link(
            self.library,
            peer,
            unique_id,
            generation,
            rank,
            idle_s=self._idle_s if rank == SENDER else None,
            deadline_s=self._deadline_s,
            ended=self._tell,
        )
        link.start()
        return link

    def _fail(self, link: Link, reason: str) -> "Future[torch.Tensor]":
        """End a link that leads to us, and what cannot come by it."""
        if link.end(reason):
            self._tell(link, reason)
        return _lost(link.peer, link.reason)

    def _tell(self, link: Link, reason: str) -> None:
        if reason:
            log.warning("nccl link failed name=%s peer=%s: %s", self.name, link.peer, reason)
        self._post(
            link.peer,
            LinkClosed(
                generation=link.generation, outgoing=link.rank == SENDER, reason=reason[:1000]
            ),
        )


def _lost(sender: str, reason: str | None) -> "Future[torch.Tensor]":
    future: Future[torch.Tensor] = Future()
    future.set_exception(PeerLost(f"a tensor from {sender}: {reason}"))
    return future
