"""Device tensors to processes of other nodes, and to GPUs that CUDA IPC does not reach: over NCCL.

    links = NcclLinks("job/rollout-0", NcclLibrary(), post)      # both ends have one
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
Memory: `send` holds the tensor until it has left; it must not be changed before `sent` is done. Nothing bounds what is
in flight: channels do, by credits.

Each link has a thread, and only it touches the communicator, which is non-blocking: NCCL does not allow that one thread
aborts what another one is waiting in. NCCL wakes nobody, so this thread looks again after pauses that grow with the
time it has looked, up to 2 ms.
"""

import ctypes
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch

from channels.errors import BadFrame, Closed, PeerLost
from channels.messages import Message
from channels.tensors.devices import CudaDevice, DeviceEvent
from channels.tensors.errors import DeviceError, DeviceUnreachable

log = logging.getLogger(__name__)

UNIQUE_ID_BYTES = 128
DEADLINE_S = 30.0
IDLE_S = 30.0
MAX_BYTES = 64 << 30  # of one tensor; more than that is a damaged place
MAX_STARTED = (
    2  # transfers on a stream: the second starts on the device when the first ends, without us
)
_LOOK_S, _LOOK_MAX_S = 50e-6, 2e-3
_SENDER, _RECEIVER = range(2)  # ranks
UNUSED = "its link was idle"


class NcclPlace(msgspec.Struct, frozen=True, array_like=True):
    """Sender to receiver, in place of the bytes: the sequence-th tensor of a link."""

    unique_id: bytes
    generation: int
    sequence: int
    nbytes: int
    uuid: str  # of the sender's GPU


class LinkClosed(Message, frozen=True, tag="nccl_link_closed"):
    """Either end to the other: this link is not used any more. outgoing: it leads to the receiver of this message.

    reason: empty when it was idle
    """

    generation: int
    outgoing: bool
    reason: str = ""


class Communicator(Protocol):
    """Two ranks and a stream. For one thread; no method blocks but `abort`. All raise DeviceError for what failed."""

    def settled(self) -> bool:
        """Whether NCCL has carried out the last call: made the connection, put the transfer on the stream."""
        ...

    def send(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        """Send to the other rank; starts after the event."""
        ...

    def receive(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        """Fill the tensor with what the other rank sends; starts after the event."""
        ...

    def mark(self) -> DeviceEvent:
        """The point when all settled transfers are done."""
        ...

    def abort(self) -> None:
        """End transfers that hang, and free everything. Nothing may be called afterwards."""
        ...


class Library(Protocol):
    """NCCL on one GPU."""

    device: torch.device
    uuid: str

    def unique_id(self) -> bytes:
        """By which two ranks find each other, once."""
        ...

    def connect(self, unique_id: bytes, rank: int) -> Communicator:
        """Begin to be one of two ranks."""
        ...

    def now(self) -> DeviceEvent:
        """The point after what was given to the current stream."""
        ...


@dataclass(slots=True, eq=False)
class _Transfer:
    tensor: torch.Tensor
    after: DeviceEvent
    future: "Future[torch.Tensor]"
    done: DeviceEvent | None = None  # once the device has it


class _Link:
    """One communicator and its thread. See the module docstring.

    ended: called in its thread when the link failed by itself, with the reason, or was idle, with ""
    """

    def __init__(
        self,
        library: Library,
        peer: str,
        unique_id: bytes,
        generation: int,
        rank: int,
        *,
        idle_s: float | None,
        deadline_s: float,
        ended: Callable[["_Link", str], None],
    ) -> None:
        self.peer, self.unique_id, self.generation, self.rank = peer, unique_id, generation, rank
        self.sequence = 0  # of the next transfer
        self.bytes_done = 0
        self._library, self._idle_s, self._deadline_s = library, idle_s, deadline_s
        self._ended = ended
        self._jobs: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._pending: dict[Future[torch.Tensor], None] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._reason: str | None = None
        self._started: deque[_Transfer] = deque()
        self._thread = threading.Thread(
            target=self._run, name=f"nccl-{peer}.{generation}", daemon=True
        )

    @property
    def reason(self) -> str | None:
        """Why it takes no more transfers; None while it does."""
        return self._reason

    @property
    def pending(self) -> int:
        """Transfers that are not done."""
        return len(self._pending)

    def start(self) -> None:
        """Connect."""
        self._thread.start()

    def transfer(self, tensor: torch.Tensor, after: DeviceEvent) -> "Future[torch.Tensor] | None":
        """Send, or fill, a tensor. Its future has it when done. None when the link is over."""
        future: Future[torch.Tensor] = Future()
        future.set_running_or_notify_cancel()  # a transfer cannot be taken back: the other end counts them
        with self._lock:
            if self._reason is not None:
                return None
            self.sequence += 1
            self._pending[future] = None
        self._jobs.put(_Transfer(tensor, after, future))
        return future

    def end(self, reason: str) -> bool:
        """Fail what is pending now, and let the thread abort. Returns whether the link was not over before."""
        with self._lock:
            if self._reason is not None:
                return False
            self._reason = reason
            pending = list(self._pending)
            self._pending.clear()
        self._over.set()
        self._jobs.put(None)
        for future in pending:
            future.set_exception(PeerLost(f"a tensor {self._route}: {reason}"))
        return True

    def finish(self) -> None:
        """End after what is pending."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_s)

    @property
    def _route(self) -> str:
        return f"to {self.peer}" if self.rank == _SENDER else f"from {self.peer}"

    def _run(self) -> None:
        communicator: Communicator | None = None
        try:
            communicator = self._library.connect(self.unique_id, self.rank)
            if self._until(communicator.settled):
                self._serve(communicator)
        except (DeviceError, RuntimeError) as error:  # RuntimeError is what torch raises
            if self.end(str(error)):
                self._ended(self, str(error))
        if communicator is not None:
            try:
                communicator.abort()
            except (DeviceError, RuntimeError) as error:
                log.warning("nccl link is not taken down cleanly %s: %s", self._route, error)
        self._started.clear()  # not before: until then the device may read and write these tensors

    def _serve(self, communicator: Communicator) -> None:
        started = self._started
        closing = False
        while not self._over.is_set():
            job = None
            if len(started) < MAX_STARTED and not closing:
                try:
                    job = self._jobs.get(block=not started, timeout=self._idle_s)
                    closing = job is None
                except queue.Empty:
                    if not started and self._retire():
                        self._ended(self, "")
                        return
            if job is not None:
                started.append(job)
                if self.rank == _SENDER:
                    communicator.send(job.tensor, job.after)
                else:
                    communicator.receive(job.tensor, job.after)
                if not self._until(communicator.settled):
                    return
                job.done = communicator.mark()
            elif started:
                done = started[0].done
                assert done is not None
                if not self._until(functools.partial(_reached, communicator, done)):
                    return
                self._resolve(started.popleft())
            elif closing:
                self.end(UNUSED)
                return

    def _retire(self) -> bool:
        """Take no more, unless something has come meanwhile."""
        with self._lock:
            if not self._pending:
                self._reason = UNUSED
            return not self._pending

    def _resolve(self, transfer: _Transfer) -> None:
        with self._lock:
            mine = transfer.future in self._pending
            self._pending.pop(transfer.future, None)
        if mine:
            self.bytes_done += transfer.tensor.nbytes
            transfer.future.set_result(transfer.tensor)

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Look until it holds. False when the link is over; DeviceError past the deadline."""
        begin = time.monotonic()
        while not condition():
            waited = time.monotonic() - begin
            if waited > self._deadline_s:
                raise DeviceError(f"no answer within {self._deadline_s:g} s")
            if self._over.wait(min(max(_LOOK_S, waited / 32), _LOOK_MAX_S)):
                return False
        return not self._over.is_set()


def _lost(sender: str, reason: str | None) -> "Future[torch.Tensor]":
    future: Future[torch.Tensor] = Future()
    future.set_exception(PeerLost(f"a tensor from {sender}: {reason}"))
    return future


def _reached(communicator: Communicator, event: DeviceEvent) -> bool:
    """Whether it was. Asks NCCL too: where the network lost the peer, the device itself would wait for ever."""
    communicator.settled()
    return event.query()


class NcclLinks:
    """All links of a process on one GPU. `send`, `receive`, `closed`, `peer_gone` and `close` belong to the loop.

    post: sends a message to a peer; called from any thread
    """

    def __init__(
        self,
        name: str,
        library: Library,
        post: Callable[[str, LinkClosed], None],
        *,
        idle_s: float = IDLE_S,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.name, self.library = name, library
        self._post = post
        self._idle_s, self._deadline_s = idle_s, deadline_s
        # Larger than any of a process that had this name before.
        self._generation = time.time_ns()
        self._outgoing: dict[str, _Link] = {}
        self._incoming: dict[str, _Link] = {}
        self._refused: dict[str, tuple[int, str]] = {}
        self._closed = False

    def send(self, peer: str, tensor: torch.Tensor) -> "tuple[bytes, Future[torch.Tensor]]":
        """Send a contiguous tensor of this GPU after what the current stream has to do.

        Returns the place, for the message, and what is done when the tensor has left.
        """
        if self._closed:
            raise Closed(f"the NCCL links of {self.name} are closed")
        if not tensor.is_contiguous() or tensor.device != self.library.device or not tensor.nbytes:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} cannot be sent from "
                f"{self.library.device}: make it contiguous there, and leave out empty ones"
            )
        after = self.library.now()
        while True:
            link = self._outgoing.get(peer) or self._open(peer)
            sequence = link.sequence
            future = link.transfer(tensor, after)
            if future is not None:
                break
            del self._outgoing[peer]  # it failed, or was idle: the next generation serves
        place = NcclPlace(
            link.unique_id, link.generation, sequence, tensor.nbytes, self.library.uuid
        )
        return msgspec.msgpack.encode(place), future

    def receive(self, sender: str, place: bytes | memoryview) -> "Future[torch.Tensor]":
        """What will have the tensor, uint8, on this GPU, when all of it is there; PeerLost if it cannot come.

        Raises BadFrame for bytes that are no place or not the next one, DeviceUnreachable for a sender on this
        same GPU.
        """
        if self._closed:
            raise Closed(f"the NCCL links of {self.name} are closed")
        where = self._decoded(place)
        link = self._incoming.get(sender)
        if link is None or where.generation > link.generation:
            refused, reason = self._refused.get(sender, (-1, ""))
            if where.generation <= refused:
                return _lost(sender, reason)
            if link is not None:
                link.finish()
            link = self._accept(sender, where)
        if where.generation < link.generation or link.reason is not None:
            return _lost(sender, link.reason or "its link is over")
        if where.sequence != link.sequence or where.unique_id != link.unique_id:
            self._fail(link, f"tensor {where.sequence} came where {link.sequence} was next")
            raise BadFrame(f"a tensor from {sender}: {link.reason}")
        try:
            tensor = torch.empty(where.nbytes, dtype=torch.uint8, device=self.library.device)
        except torch.OutOfMemoryError:
            self._fail(link, f"no room for {where.nbytes} bytes at {self.name}")
            return _lost(sender, link.reason)
        # The memory may have been another tensor's, which the current stream still reads.
        return link.transfer(tensor, self.library.now()) or _lost(sender, link.reason)

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
        self._refused.pop(peer, None)
        for links in (self._outgoing, self._incoming):
            link = links.pop(peer, None)
            if link is not None:
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
        links = [*self._outgoing.values(), *self._incoming.values()]
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
            or not 0 < where.nbytes <= MAX_BYTES
        ):
            raise BadFrame(
                f"not a tensor of an NCCL link: id of {len(where.unique_id)} bytes, generation "
                f"{where.generation}, sequence {where.sequence}, {where.nbytes} bytes"
            )
        return where

    def _open(self, peer: str) -> _Link:
        self._generation += 1
        link = self._outgoing[peer] = _Link(
            self.library,
            peer,
            self.library.unique_id(),
            self._generation,
            _SENDER,
            idle_s=self._idle_s,
            deadline_s=self._deadline_s,
            ended=self._tell,
        )
        link.start()
        return link

    def _accept(self, sender: str, where: NcclPlace) -> _Link:
        if where.uuid == self.library.uuid:
            # NCCL would hang, or refuse in words that name neither end.
            reason = f"{self.name} and {sender} are on the same GPU, {where.uuid}, which NCCL cannot connect"
            self._refused[sender] = (where.generation, reason)
            self._post(
                sender, LinkClosed(generation=where.generation, outgoing=False, reason=reason)
            )
            raise DeviceUnreachable(reason)
        link = self._incoming[sender] = _Link(
            self.library,
            sender,
            where.unique_id,
            where.generation,
            _RECEIVER,
            idle_s=None,
            deadline_s=self._deadline_s,
            ended=self._tell,
        )
        link.start()
        return link

    def _fail(self, link: _Link, reason: str) -> None:
        if link.end(reason):
            self._tell(link, reason)

    def _tell(self, link: _Link, reason: str) -> None:
        if reason:
            log.warning("nccl link failed name=%s peer=%s: %s", self.name, link.peer, reason)
        self._post(
            link.peer,
            LinkClosed(
                generation=link.generation, outgoing=link.rank == _SENDER, reason=reason[:1000]
            ),
        )


class _Config(ctypes.Structure):
    """The part of ncclConfig_t that NCCL 2.18 had; later versions take the rest from their defaults."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
    )


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * UNIQUE_ID_BYTES),)


_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_MAGIC = 0xCAFEBEEF
_CONFIG_VERSION = 21800
_UNDEFINED = -(1 << 31)


class NcclLibrary:
    """The NCCL that torch has loaded.

    Neither torch nor cupy lets one make a communicator without blocking and abort it while it is being made.
    """

    def __init__(self, device: CudaDevice | None = None) -> None:
        gpu = device or CudaDevice()
        self.device, self.uuid = gpu.device, gpu.uuid
        self._gpu = gpu
        self._functions = load_nccl()

    def unique_id(self) -> bytes:
        return make_unique_id(self._functions)

    def connect(self, unique_id: bytes, rank: int) -> Communicator:
        return _CudaCommunicator(self._functions, self._gpu, unique_id, rank)

    def now(self) -> DeviceEvent:
        event = self._gpu.event()
        event.record(self._gpu.stream())
        return event


def load_nccl() -> ctypes.CDLL:
    """NCCL's functions, declared. Raises DeviceError when there is no NCCL."""
    try:
        functions = ctypes.CDLL(
            "libnccl.so.2"
        )  # already in the process, with a CUDA build of torch
    except OSError as error:
        raise DeviceError(
            f"NCCL cannot be loaded: {error}; CUDA builds of torch bring it"
        ) from error
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    transfer = (pointer, size, number, number, pointer, pointer)
    arguments = {
        "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
        "ncclCommInitRankConfig": (
            ctypes.POINTER(pointer),
            number,
            _UniqueId,
            number,
            ctypes.POINTER(_Config),
        ),
        "ncclCommGetAsyncError": (pointer, ctypes.POINTER(number)),
        "ncclCommAbort": (pointer,),
        "ncclSend": transfer,
        "ncclRecv": transfer,
    }
    for name, types in arguments.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = types, number
    for name in ("ncclGetErrorString", "ncclGetLastError"):
        getattr(functions, name).restype = ctypes.c_char_p
    functions.ncclGetErrorString.argtypes = (number,)
    functions.ncclGetLastError.argtypes = (pointer,)
    return functions


def make_unique_id(functions: ctypes.CDLL) -> bytes:
    """What `load_nccl`'s functions say is a new unique id."""
    unique_id = _UniqueId()
    _check(functions, "ncclGetUniqueId", functions.ncclGetUniqueId(ctypes.byref(unique_id)))
    return bytes(unique_id)


def _check(functions: ctypes.CDLL, name: str, result: int) -> None:
    if result not in (_SUCCESS, _IN_PROGRESS):
        what = functions.ncclGetErrorString(result).decode(errors="replace")
        last = (functions.ncclGetLastError(None) or b"").decode(errors="replace").strip()
        raise DeviceError(f"{name}: {what}" + (f" ({last})" if last else ""))


class _CudaCommunicator:
    """See Communicator."""

    def __init__(
        self, functions: ctypes.CDLL, gpu: CudaDevice, unique_id: bytes, rank: int
    ) -> None:
        self._functions, self._gpu, self._rank = functions, gpu, rank
        self._communicator = ctypes.c_void_p()
        self._stream: Any = torch.cuda.Stream(gpu.device)  # type: ignore[no-untyped-call]
        config = _Config(
            ctypes.sizeof(_Config),
            _MAGIC,
            _CONFIG_VERSION,
            0,
            _UNDEFINED,
            _UNDEFINED,
            _UNDEFINED,
            None,
            _UNDEFINED,
            _UNDEFINED,
        )
        self._call(
            "ncclCommInitRankConfig",
            ctypes.byref(self._communicator),
            2,
            _UniqueId.from_buffer_copy(unique_id),
            rank,
            ctypes.byref(config),
        )

    def settled(self) -> bool:
        state = ctypes.c_int()
        self._call("ncclCommGetAsyncError", self._communicator, ctypes.byref(state))
        _check(self._functions, "NCCL", state.value)
        return state.value == _SUCCESS

    def send(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        self._transfer("ncclSend", tensor, after)

    def receive(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        self._transfer("ncclRecv", tensor, after)

    def mark(self) -> DeviceEvent:
        event = self._gpu.event()
        event.record(self._stream)
        return event

    def abort(self) -> None:
        self._call("ncclCommAbort", self._communicator)
        self._stream.synchronize()  # it may return before the transfers have ended

    def _transfer(self, name: str, tensor: torch.Tensor, after: DeviceEvent) -> None:
        after.wait(self._stream)
        self._call(
            name,
            tensor.data_ptr(),
            tensor.nbytes,
            _UINT8,
            1 - self._rank,
            self._communicator,
            self._stream.cuda_stream,
        )

    def _call(self, name: str, *arguments: Any) -> None:
        # NCCL looks at the thread's current device.
        with torch.cuda.device(self._gpu.device):
            _check(self._functions, name, getattr(self._functions, name)(*arguments))
