"""Endpoints of processes: over Unix sockets and shared memory within a node, over ZeroMQ between nodes."""

import itertools
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from channels import messages, payload
from channels.endpoint import (
    MAX_PAYLOAD_BYTES,
    OnMessage,
    Transport,
    check_size,
    not_connected,
    unhandled,
)
from channels.errors import BadFrame, ChannelError, Closed
from channels.messages import Message
from channels.remote import MAX_NAME_BYTES, Remote
from channels.security import Security
from channels.sockets import Connection, Frame, Part
from channels.streams import LocalConnection, LocalMailbox
from channels.tensors.device_frames import DeviceFrames
from channels.tensors.device_messages import DeviceMessage
from channels.tensors.returning import OnLoop
from channels.tensors.shm import ArenaFrame, SharedArena, SharedViews
from channels.tensors.tcp import (
    CHUNK_BYTES,
    IDENTITY_SUFFIX,
    BulkReceiver,
    BulkSender,
    Transfer,
)

if TYPE_CHECKING:
    from channels.tensors.devices import Device

log = logging.getLogger(__name__)

AROUND_BYTES = 16 * 1024  # of the packed payloads in a batch: their places and padding
MAX_IPC_PATH_BYTES = 107  # sockaddr_un.sun_path, less its terminating zero
CLOSE_LINGER_MS = 500
BEFORE_FRAMES = 5  # of a message on the wire: sender, message, header, pack, kinds of the frames
SHARED_FRAME_BYTES = (
    128 * 1024
)  # below it a socket is as fast as shared memory: waking the other end is what counts
# What a frame on the wire is: the bytes, their place in shared memory, the name under which they
# follow in chunks, their place on a device, or the transfer by which they come over NCCL.
_BYTES, _SHARED, _CHUNKED, _DEVICE, _NCCL = range(5)


class FramesReleased(Message, frozen=True, tag="frames_released"):
    """Receiver to sender: these blocks of your arena are no longer looked at here."""

    blocks: tuple[int, ...]


class FrameFollows(Message, frozen=True, tag="frame_follows"):
    """Sender to receiver: here is a frame that was announced, and could not come as it was to."""

    transfer: int


class SocketEndpoint:
    """An endpoint between processes: over Unix sockets within a node, over ZeroMQ between nodes.

    Made on the running loop. address: "ipc:///path" (at most 107 bytes of path) or
    "tcp://host:port"; with port "*" the attribute `address` says which was taken. Messages that
    arrive before the loop runs again wait for the handler.
    listen: a second mailbox, at a TCP address; `remote_address` says where.
    security: makes it a member of a cluster over TCP; without one TCP is for loopback only.

    shared_dir: a directory on a tmpfs, the same for the processes of a job on this node. Large arrays
    for peers at "ipc://" addresses then travel through shared memory, see `channels.tensors.shm`.
    device: gives the GPU of this process, when it is first needed. Device tensors then stay on the device, for
    peers of this node by CUDA IPC and for others over NCCL, see `channels.tensors.device_frames`; where neither
    can be had they go through the host, and arrive there.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        listen: str = "",
        security: Security | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        shared_dir: Path | None = None,
        device: "Callable[[], Device] | None" = None,
        device_type: str = "cuda",
    ) -> None:
        if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(
                f'endpoint name "{name}": 1 to {MAX_NAME_BYTES} bytes are allowed; shorten it'
            )
        self.name = name
        self.on_message: OnMessage = unhandled
        self.max_payload_bytes = max_payload_bytes
        self._peers: dict[str, tuple[str, Connection]] = {}
        self._names: dict[bytes, str] = {}
        self._bulk: dict[str, BulkSender] = {}
        self._incoming = BulkReceiver(max_payload_bytes)
        # From a random number on: those of a process of our name that was killed are not ours.
        self._transfers = itertools.count(secrets.randbits(62))
        self._closed = False
        self._arena: SharedArena | None = None
        self._views: SharedViews | None = None
        self._returning = OnLoop(self._return_released)  # blocks to their senders
        if shared_dir is not None:
            self._arena = SharedArena(shared_dir, quote(name, safe=""))
            self._views = SharedViews(shared_dir, self._returning.soon)
        self._devices = DeviceFrames(
            name,
            device,
            device_type=device_type,
            numbers=self._transfers,
            say=self._tell,
            send_bytes=self._send_bytes,
            incoming=self._incoming,
            max_bytes=max_payload_bytes,
            far=security is None or security.plain_bulk,
        )
        _check_path(address)
        self._remote = Remote(
            name,
            security,
            max_message_bytes=max_payload_bytes + AROUND_BYTES,
            received=self._received,
            chunk=self._incoming.chunk,
        )
        self._mailbox: LocalMailbox | None = None
        if not address.startswith("ipc://"):
            self._remote.listen(address)
        else:
            if listen:
                self._remote.listen(listen)
            limit = max_payload_bytes + messages.MAX_MESSAGE_BYTES
            try:
                self._mailbox = LocalMailbox(address.removeprefix("ipc://"), self._received, limit)
            except OSError as error:
                self._remote.close()
                raise ChannelError(
                    f"endpoint {name} cannot bind {address}: {error.strerror}"
                ) from error
        self.remote_address = self._remote.address
        self.address = address if self._mailbox is not None else self.remote_address

    def connect(self, peer: str, address: str) -> None:
        if self._closed:
            raise Closed(f"endpoint {self.name} is closed")
        known = self._peers.get(peer)
        if known is not None:
            if known[0] == address:
                return
            self.disconnect(peer)
        _check_path(address)
        connection: Connection
        if address.startswith("ipc://"):
            connection = LocalConnection(address.removeprefix("ipc://"), self.name.encode())
        else:
            connection = self._remote.connect(peer, address)
        self._peers[peer] = (address, connection)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known[1].close(0)
            bulk = self._bulk.pop(peer, None)
            if bulk is not None:
                bulk.close()
            self._incoming.forget(peer)
            self._devices.forget(peer)
            if self._arena is not None and self._views is not None:
                self._arena.peer_gone(peer)
                self._views.forget(quote(peer, safe=""))

    def empty_on_device(self, shape: Sequence[int], dtype: Any) -> Any:
        """A torch tensor to be filled and sent without a copy, in memory that peers reach; None without room or GPU."""
        return self._devices.empty(tuple(shape), dtype)

    def empty(self, shape: Sequence[int] | int, dtype: Any = np.float32) -> Any:
        """A numpy array to be filled and sent: where the peers share memory with us, it lies there already."""
        array = None if self._arena is None else self._arena.empty(shape, dtype)
        return np.empty(shape, dtype) if array is None else array

    def pack(self, tree: Any) -> payload.Encoded:
        return self._pack(tree, self.max_payload_bytes)

    def _pack(self, tree: Any, limit: int) -> payload.Encoded:
        if isinstance(tree, payload.Encoded):
            return tree
        encoded = payload.encode(tree, self._devices.frame)
        check_size(encoded.size_bytes, limit)
        return self._share(encoded)

    def send(self, peer: str, message: Message, payload: Any = None) -> None:
        known = self._peers.get(peer)
        if known is None:
            if self._closed:
                raise Closed(f"endpoint {self.name} is closed")
            raise not_connected(self.name, peer)
        head = messages.encode(message)
        if payload is None:
            known[1].send([head])
        else:
            around = AROUND_BYTES if isinstance(payload, list) else 0
            encoded = self._pack(payload, self.max_payload_bytes + around)
            parts: list[Part] = [head, encoded.header]
            if encoded.frames:
                parts += [encoded.pack, *self._frames(peer, known[0], encoded.frames)]
            elif encoded.pack:
                parts.append(encoded.pack)
            known[1].send(parts)

    def transport(self, peer: str) -> Transport:
        if peer not in self._peers:
            raise not_connected(self.name, peer)
        address = self._peers[peer][0]
        near = address.startswith("ipc://")
        if not near:
            transport = Transport(*self._remote.describe(address))
        elif self._arena is None:
            transport = Transport("ipc", "same node, and no shared directory was given")
        else:
            least = f"{SHARED_FRAME_BYTES >> 10} KiB"
            why = f"same node; arrays below {least} and all else through the ipc socket"
            transport = Transport("shared_memory", why)
        way = self._devices.way(peer, near=near)
        if way is None:
            return transport
        if not way.transport:
            return Transport(transport.name, f"{transport.why}; {way.why}")
        return Transport(
            way.transport, f"{way.why}; host memory by {transport.name}: {transport.why}"
        )

    def _share(self, encoded: payload.Encoded) -> payload.Encoded:
        """Put large frames where peers of this node can see them."""
        arena = self._arena
        if arena is None or all(f.nbytes < SHARED_FRAME_BYTES for f in encoded.frames):
            return encoded
        frames = [
            (isinstance(f, memoryview) and f.nbytes >= SHARED_FRAME_BYTES and arena.copy_in(f)) or f
            for f in encoded.frames
        ]
        return payload.Encoded(encoded.header, encoded.pack, frames)

    def _frames(
        self, peer: str, address: str, frames: Sequence[memoryview | payload.SharedFrame]
    ) -> list[payload.Buffer]:
        """What kind each frame is, and then the frames."""
        kinds = bytearray()
        parts: list[payload.Buffer] = []
        for frame in frames:
            placed = self._placed(peer, frame, near=address.startswith("ipc://"))
            if placed is not None:
                kind, place = placed
                kinds.append(kind)
                parts.append(place)
            elif address.startswith("tcp://") and frame.nbytes > CHUNK_BYTES:
                transfer = Transfer(next(self._transfers), frame.nbytes)
                kinds.append(_CHUNKED)
                parts.append(transfer.place())
                view = frame if isinstance(frame, memoryview) else frame.view
                self._bulk_to(peer, address).add(transfer, view)
            else:
                kinds.append(_BYTES)
                parts.append(frame if isinstance(frame, memoryview) else frame.view)
        return [kinds, *parts]

    def _placed(
        self, peer: str, frame: memoryview | payload.SharedFrame, *, near: bool
    ) -> tuple[int, bytes] | None:
        """Kind and place of a frame whose bytes do not go through a socket."""
        if isinstance(frame, memoryview):
            return None
        if isinstance(frame, ArenaFrame):
            return (_SHARED, frame.lend(peer)) if near else None
        lent = self._devices.lend(peer, frame) if near else None
        if lent is not None:
            return _DEVICE, lent
        sent = self._devices.send(peer, frame, near=near)
        return None if sent is None else (_NCCL, sent)

    def _send_bytes(self, peer: str, transfer: Transfer, data: memoryview) -> None:
        """Send a frame that was announced, and did not arrive as it was to."""
        known = self._peers.get(peer)
        if known is None:
            return
        if known[0].startswith("tcp://"):
            self._bulk_to(peer, known[0]).add(transfer, data)
        else:
            known[1].send([messages.encode(FrameFollows(transfer=transfer.number)), data])

    def _bulk_to(self, peer: str, address: str) -> BulkSender:
        bulk = self._bulk.get(peer)
        if bulk is None:
            bulk = self._bulk[peer] = self._remote.bulk(peer, address)
        return bulk

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._returning.close()
        for _, connection in self._peers.values():
            connection.close(CLOSE_LINGER_MS)
        for bulk in self._bulk.values():
            bulk.close(CLOSE_LINGER_MS)
        self._peers.clear()
        self._bulk.clear()
        self._remote.close()
        if self._mailbox is not None:
            self._mailbox.close()
        if self._arena is not None:
            self._arena.close()
        self._devices.close()

    def _received(self, frames: Sequence[Frame]) -> None:
        identity = frames[0].bytes
        sender = self._names.get(identity)
        try:
            if sender is None:
                sender = _name_of(identity.removesuffix(IDENTITY_SUFFIX))
                self._names[identity] = sender
            if len(frames) < 2:
                raise BadFrame("a message without frames")
            if identity.endswith(IDENTITY_SUFFIX):
                self._incoming.chunk(sender, frames[1].bytes, frames[-1].buffer)
                return
            message = messages.decode(frames[1].buffer)
            if isinstance(message, FramesReleased):
                if self._arena is not None:
                    self._arena.returned(sender, message.blocks)
                return
            if isinstance(message, DeviceMessage):
                self._devices.received(sender, message)
                return
            if isinstance(message, FrameFollows):
                self._incoming.arrived(sender, message.transfer, frames[-1].buffer)
                return
            transfers = self._announced(sender, frames) if len(frames) > BEFORE_FRAMES else {}
        except BadFrame as error:
            log.warning("dropped frame endpoint=%s sender=%r: %s", self.name, identity, error)
            return
        if transfers or self._incoming.holds(sender):
            lane = getattr(message, "channel", None)
            deliver = partial(self._deliver, sender, message, frames, transfers)
            if self._incoming.hold(sender, lane, transfers.values(), deliver):
                return
        self._deliver(sender, message, frames, transfers)

    def _announced(self, sender: str, frames: Sequence[Frame]) -> dict[int, Transfer]:
        """The frames of a message that do not come with it, by their place."""
        transfers = {}
        kinds = frames[BEFORE_FRAMES - 1].bytes
        for place, kind in enumerate(kinds[: len(frames) - BEFORE_FRAMES], start=BEFORE_FRAMES):
            if kind == _CHUNKED:
                transfers[place] = Transfer.read(frames[place].buffer, self.max_payload_bytes)
            elif kind == _NCCL:
                transfers[place] = self._devices.receive(sender, frames[place].buffer)
        return transfers

    def _deliver(
        self,
        sender: str,
        message: Message,
        frames: Sequence[Frame],
        transfers: dict[int, Transfer],
    ) -> None:
        tree = None
        try:
            if len(frames) > 2:
                tree = self._decode_payload(sender, frames, transfers)
        except BadFrame as error:
            log.warning("dropped frame endpoint=%s sender=%s: %s", self.name, sender, error)
            return
        self.on_message(sender, message, tree)

    def _decode_payload(
        self, sender: str, frames: Sequence[Frame], transfers: dict[int, Transfer]
    ) -> Any:
        """frames: sender, message, header, pack, the kinds of the frames, the frames."""
        header = frames[2].buffer
        if len(frames) == 3:
            return payload.decode(header)
        # The pack is small and becomes writable memory of our own; large frames are used where they are.
        buffers: list[payload.Buffer] = [bytearray(frames[3].buffer)]
        if len(frames) >= BEFORE_FRAMES:
            kinds = frames[BEFORE_FRAMES - 1].bytes
            if len(kinds) != len(frames) - BEFORE_FRAMES:
                raise BadFrame(
                    f"{len(frames) - BEFORE_FRAMES} frames came and {len(kinds)} were announced"
                )
            for place, kind in enumerate(kinds, start=BEFORE_FRAMES):
                if place in transfers:
                    buffers.append(self._incoming.take(sender, transfers[place]))
                else:
                    buffers.append(self._buffer(sender, kind, frames[place]))
        return payload.decode(header, buffers)

    def _buffer(self, sender: str, kind: int, frame: Frame) -> Any:
        if kind == _BYTES:
            return frame.buffer
        if kind == _SHARED and self._views is not None:
            return self._views.open(sender, frame.buffer)
        if kind == _DEVICE:
            return self._devices.open(sender, frame.buffer)
        raise BadFrame(f"a frame of kind {kind} cannot be read here")

    def _tell(self, peer: str, message: Message) -> None:
        """Say something between endpoints; a peer that is gone need not hear it."""
        known = self._peers.get(peer)
        if known is not None:
            known[1].send([messages.encode(message)])

    def _return_released(self) -> None:
        assert self._views is not None
        for sender, blocks in self._views.take_released().items():
            self._tell(sender, FramesReleased(blocks=tuple(blocks)))


def _name_of(identity: bytes) -> str:
    if not identity or identity.startswith(b"\0"):
        raise BadFrame("the sender declared no name")
    try:
        return identity.decode()
    except UnicodeDecodeError as error:
        raise BadFrame("the sender's name is not UTF-8") from error


def _check_path(address: str) -> None:
    if not address.startswith("ipc://"):
        return
    size = len(os.fsencode(address.removeprefix("ipc://")))
    if size > MAX_IPC_PATH_BYTES:
        raise ChannelError(
            f"the socket path of {address} has {size} bytes, the system allows "
            f"{MAX_IPC_PATH_BYTES}: use a shorter state directory (--state-dir or FLOWD_HOME)"
        )
