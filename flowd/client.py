"""The blocking client of flowd's control socket: one request at a time, every wait with an end."""

import time
import uuid
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

import zmq

from channels.control import CtlProgress, CtlReply, CtlRequest
from channels.messages import decode, encode
from flowd import lockfile
from flowd.errors import DaemonLost, FlowdError, NoDaemon, RequestError
from flowd.paths import StatePaths

START_PATIENCE_S = 5.0  # between flowd's first moment and its control socket
PROBE_INTERVAL_S = 0.5  # how soon the end of flowd is noticed in the middle of a wait
REPLY_DEADLINE_S = 30.0
# Updates that may wait for a follower whose terminal stands still; flowd keeps no queue for it.
MAX_WAITING_UPDATES = 100_000


class ControlClient:
    """Asks the flowd of a state directory. Use as a context manager, from one thread."""

    def __init__(self, paths: StatePaths) -> None:
        """Find the running flowd; NoDaemon at once when there is none."""
        self._paths = paths
        self.pid, address = _find(paths)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.rcvhwm = MAX_WAITING_UPDATES
        self._socket.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def request(
        self,
        command: str,
        arguments: dict[str, Any],
        *,
        timeout_s: float = REPLY_DEADLINE_S,
        request_id: str | None = None,
    ) -> Any:
        """Carry out a command and return its data.

        RequestError or FlowdError is what flowd answered; DaemonLost when it went away or gave no
        answer within timeout_s. A repeated request_id is carried out once.
        """
        request_id = request_id or uuid.uuid4().hex
        self._send(CtlRequest(request_id=request_id, command=command, arguments=arguments))
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._receive(deadline)
            if message is None:
                raise DaemonLost(
                    f"flowd (pid {self.pid}) did not answer `{command}` within {timeout_s:g} s; it "
                    f"may still carry it out: see `flowctl status`, and {self._paths.log}"
                )
            if isinstance(message, CtlReply) and message.request_id == request_id:
                return _data_of(message)

    def follow(
        self, command: str, arguments: dict[str, Any], *, idle_s: float | None = None
    ) -> Generator[dict[str, Any] | None, None, None]:
        """The updates of a command, in order, until flowd says that there are no more.

        With idle_s, None is yielded whenever that time passed without an update.
        """
        request_id = uuid.uuid4().hex
        self._send(
            CtlRequest(request_id=request_id, command=command, arguments=arguments, follow=True)
        )
        while True:
            message = self._receive(None if idle_s is None else time.monotonic() + idle_s)
            if message is None:
                yield None
            elif message.request_id != request_id:
                continue
            elif isinstance(message, CtlProgress):
                yield message.data
            else:
                _data_of(message)
                return

    def _send(self, request: CtlRequest) -> None:
        self._socket.send(encode(request))

    def _receive(self, deadline: float | None) -> CtlReply | CtlProgress | None:
        """The next message, or None at the deadline (of time.monotonic; None waits without end)."""
        while True:
            left = PROBE_INTERVAL_S if deadline is None else max(deadline - time.monotonic(), 0.0)
            if self._socket.poll(int(min(left, PROBE_INTERVAL_S) * 1000)):
                message = decode(self._socket.recv())
                assert isinstance(message, CtlReply | CtlProgress)
                return message
            if deadline is not None and time.monotonic() >= deadline:
                return None
            running = lockfile.holder(self._paths.lock)
            if running is None or running.pid != self.pid:
                raise DaemonLost(
                    f"flowd (pid {self.pid}) went away in the middle of this request: see "
                    f"{self._paths.log}; start it again with `flowd up`, and an interrupted job "
                    "goes on with `flowctl resume JOB`"
                )


def _find(paths: StatePaths) -> tuple[int, str]:
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        running = lockfile.holder(paths.lock)
        if running is None:
            raise NoDaemon(
                f"no flowd is running on state directory {paths.root}: start one with "
                "`flowd up --detach`, or name another directory with --state-dir or FLOWD_HOME"
            )
        if running.address:
            return running.pid, running.address
        if time.monotonic() > deadline:
            raise DaemonLost(
                f"flowd (pid {running.pid}) is starting and did not listen within "
                f"{START_PATIENCE_S:g} s: see {paths.log}"
            )
        time.sleep(0.02)  # a lock file has no event to wait for


def _data_of(reply: CtlReply) -> Any:
    if reply.ok:
        return reply.data
    kind = RequestError if reply.exit_code == RequestError.exit_code else FlowdError
    raise kind(reply.error or "flowd gave no reason")
