"""Tells of connections that were refused: ZeroMQ itself only drops them, and the one end waits for ever.

Reasons come from libzmq's monitor of a socket. Each is told once, however often a stranger knocks.
"""

import itertools
import logging

import zmq
from zmq.utils.monitor import parse_monitor_message

from channels.sockets import DrainedSocket

log = logging.getLogger(__name__)

_FAILURES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_OTHER_CLUSTER = "it has not the key of this cluster"
_PROTOCOL_REASONS = {
    int(
        zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
    ): "one end has a cluster key, the other has none",
    int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC): _OTHER_CLUSTER,
}
_numbers = itertools.count()


class HandshakeWatch:
    """Logs why handshakes of a socket fail. Made on the running loop, before the socket binds or connects.

    what: the socket, in words, such as "connection to job/env-0"
    """

    def __init__(self, socket: "zmq.Socket[bytes]", what: str) -> None:
        self._socket = socket
        self._what = what
        self._told: set[str] = set()
        address = f"inproc://handshakes-{next(_numbers)}"
        socket.monitor(address, _FAILURES)
        events = socket.context.socket(zmq.PAIR)
        events.setsockopt(
            zmq.RCVHWM, 0
        )  # or libzmq's own thread would wait for a loop that is busy
        events.setsockopt(zmq.LINGER, 0)
        events.connect(address)
        self._events = DrainedSocket(events, self._happened)

    def close(self) -> None:
        """Watch no more. Before the socket itself is closed."""
        self._socket.disable_monitor()
        self._events.close()

    def _happened(self, frames: list[zmq.Frame]) -> None:
        event = parse_monitor_message([frame.bytes for frame in frames])
        reason = _reason(event["event"], event["value"])
        if reason not in self._told:
            self._told.add(reason)
            log.warning(
                "refused %s at %s: %s (told once)", self._what, event["endpoint"].decode(), reason
            )


def _reason(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return _OTHER_CLUSTER
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return _PROTOCOL_REASONS.get(value, f"it does not speak our protocol (error {value:#x})")
    return "the other end left in the handshake: it has another cluster's key, or none"
