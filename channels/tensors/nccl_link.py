"""One communicator of two ranks, used in one direction, and the threads that drive it.

NCCL does not allow that one thread aborts what another one is waiting in, so the communicator is non-blocking, and a
thread of the link asks until NCCL has carried out a call; that takes microseconds, but for connecting. A second thread
waits for the device, woken by it, and tells at once what has arrived. The first one looks from time to time whether the
network has failed, which the device itself would never notice.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from channels.errors import PeerLost
from channels.tensors.devices import DeviceEvent
from channels.tensors.errors import DeviceError

log = logging.getLogger(__name__)

UNIQUE_ID_BYTES = 128
# Transfers on a stream: the second starts on the device when the first ends, without us.
MAX_STARTED = 2
SENDER, RECEIVER = range(2)  # ranks
UNUSED = "its link was idle"

_SPIN_S = 500e-6  # that long NCCL is asked without a pause: a transfer is on the stream by then
_PAUSE_S, _PAUSE_MAX_S = 50e-6, 2e-3
_LOOK_S = 50e-3  # between two looks at the network


class Communicator(Protocol):
    """Two ranks and a stream. No method blocks but `abort`. All raise DeviceError for what failed, and once aborted."""

    def settled(self) -> bool:
        """Whether NCCL has carried out the last call: made the connection, put the transfer on the stream."""
        ...

    def send(self, tensor: torch.Tensor, after: DeviceEvent) -> None:
        """Send to the other rank; starts after the event."""
        ...

    def receive(self, tensor: torch.Tensor) -> None:
        """Fill a tensor of `Library.empty` with what the other rank sends."""
        ...

    def mark(self) -> DeviceEvent:
        """The point when all settled transfers are done."""
        ...

    def abort(self) -> None:
        """End transfers that hang, and free everything. Returns when the device has let go of all tensors."""
        ...


class Library(Protocol):
    """NCCL on one GPU."""

    device: torch.device
    version: int  # as NCCL numbers it; both ends need the same

    def unique_id(self) -> bytes:
        """By which two ranks find each other, once."""
        ...

    def connect(self, unique_id: bytes, rank: int) -> Communicator:
        """Begin to be one of two ranks."""
        ...

    def now(self) -> DeviceEvent:
        """The point after what was given to the current stream."""
        ...

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory that may be filled at once, whatever the current stream still has to do.

        For the current stream; who reads it on another one says so by `record_stream`. Raises torch.OutOfMemoryError.
        """
        ...


@dataclass(slots=True, eq=False)
class _Transfer:
    tensor: torch.Tensor
    after: DeviceEvent | None
    future: "Future[torch.Tensor]"


class _Arrived:
    """In the inbox of the link's thread: the oldest transfer is done."""


class Link:
    """See the module docstring.

    ended: called in a thread of the link when it failed by itself, with the reason, or was idle, with ""
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
        ended: Callable[["Link", str], None],
    ) -> None:
        self.peer, self.unique_id, self.generation, self.rank = peer, unique_id, generation, rank
        self.sequence = 0  # of the next transfer
        self.bytes_done = 0
        self._library, self._idle_s, self._deadline_s = library, idle_s, deadline_s
        self._ended = ended
        # None: take no more.
        self._inbox: queue.SimpleQueue[_Transfer | _Arrived | None] = queue.SimpleQueue()
        self._marked: queue.SimpleQueue[tuple[_Transfer, DeviceEvent] | None] = queue.SimpleQueue()
        self._pending: dict[Future[torch.Tensor], None] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._reason: str | None = None
        self._started: deque[_Transfer] = deque()
        self._progress = 0.0  # when the oldest of these became the oldest
        name = f"nccl-{peer}.{generation}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

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

    def transfer(
        self, tensor: torch.Tensor, after: DeviceEvent | None = None
    ) -> "Future[torch.Tensor] | None":
        """Send a tensor, after an event, or fill it. Its future has it when done. None when the link is over."""
        future: Future[torch.Tensor] = Future()
        future.set_running_or_notify_cancel()  # a transfer cannot be taken back: the other end counts them
        with self._lock:
            if self._reason is not None:
                return None
            self.sequence += 1
            self._pending[future] = None
        self._inbox.put(_Transfer(tensor, after, future))
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
        self._inbox.put(None)
        for future in pending:
            future.set_exception(PeerLost(f"a tensor {self._route}: {reason}"))
        return True

    def finish(self) -> None:
        """End after what is pending."""
        self._inbox.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread."""
        self._thread.join(timeout_s)

    @property
    def _route(self) -> str:
        return f"to {self.peer}" if self.rank == SENDER else f"from {self.peer}"

    def _fail(self, error: Exception) -> None:
        if self.end(str(error)):
            self._ended(self, str(error))

    def _run(self) -> None:
        communicator: Communicator | None = None
        waiter: threading.Thread | None = None
        try:
            communicator = self._library.connect(self.unique_id, self.rank)
            if self._settle(communicator):
                name = f"{threading.current_thread().name}-device"
                waiter = threading.Thread(
                    target=self._wait_for_device, args=(communicator,), name=name, daemon=True
                )
                waiter.start()
                self._serve(communicator)
        except (DeviceError, RuntimeError) as error:  # RuntimeError is what torch raises
            self._fail(error)
        if communicator is not None:
            try:
                communicator.abort()
            except (DeviceError, RuntimeError) as error:
                log.warning("nccl link is not taken down cleanly %s: %s", self._route, error)
        if waiter is not None:
            self._marked.put(None)
            waiter.join()
        self._started.clear()  # not before: until then the device may read and write these tensors

    def _serve(self, communicator: Communicator) -> None:
        waiting: deque[_Transfer] = deque()
        closing = False
        while not self._over.is_set():
            try:
                item = self._inbox.get(timeout=_LOOK_S if self._started else self._idle_s)
            except queue.Empty:
                if self._started:
                    communicator.settled()  # raises where the network failed
                    self._check_deadline(self._progress)
                elif self._retire():
                    self._ended(self, "")
                    return
                continue
            if item is None:
                closing = True
            elif isinstance(item, _Transfer):
                waiting.append(item)
            else:
                self._started.popleft()
                self._progress = time.monotonic()
            while waiting and len(self._started) < MAX_STARTED:
                if not self._begin(communicator, waiting.popleft()):
                    return
            if closing and not self._started:
                self.end(UNUSED)
                return

    def _begin(self, communicator: Communicator, transfer: _Transfer) -> bool:
        """Put a transfer on the stream. False when the link is over."""
        if not self._started:
            self._progress = time.monotonic()
        self._started.append(transfer)
        if transfer.after is not None:
            communicator.send(transfer.tensor, transfer.after)
        else:
            communicator.receive(transfer.tensor)
        if not self._settle(communicator):
            return False
        self._marked.put((transfer, communicator.mark()))
        return True

    def _settle(self, communicator: Communicator) -> bool:
        """Ask NCCL until it has done what it was told. False when the link is over."""
        begin = time.monotonic()
        while not communicator.settled():
            self._check_deadline(begin)
            waited = time.monotonic() - begin
            if waited > _SPIN_S and self._over.wait(min(max(_PAUSE_S, waited / 32), _PAUSE_MAX_S)):
                return False
        return not self._over.is_set()

    def _check_deadline(self, since: float) -> None:
        if time.monotonic() - since > self._deadline_s:
            raise DeviceError(f"no answer within {self._deadline_s:g} s")

    def _retire(self) -> bool:
        """Take no more, unless something has come meanwhile."""
        with self._lock:
            if not self._pending:
                self._reason = UNUSED
            return not self._pending

    def _wait_for_device(self, communicator: Communicator) -> None:
        while (marked := self._marked.get()) is not None:
            transfer, done = marked
            try:
                done.synchronize()
                if not self._over.is_set():
                    communicator.settled()  # raises where the network failed: then it is done, and not whole
            except (DeviceError, RuntimeError) as error:
                self._fail(error)
            self._resolve(transfer)
            self._inbox.put(_Arrived())

    def _resolve(self, transfer: _Transfer) -> None:
        with self._lock:
            mine = transfer.future in self._pending
            self._pending.pop(transfer.future, None)
        if mine:
            self.bytes_done += transfer.tensor.nbytes
            transfer.future.set_result(transfer.tensor)
