"""Endpoints: a named mailbox, and one-way connections from it to the mailboxes of others.

    endpoint.on_message = handle                       # handle(sender, message, payload)
    endpoint.connect("job/trainer-0", address)
    endpoint.send("job/trainer-0", message, payload)

Contract, the same for both kinds:
* Order: messages from one sender arrive in the order they were sent, within each channel and among
  those of no channel; a large payload over TCP does not keep other messages waiting. Nothing is
  promised across senders.
* Loss: none while both ends live and stay connected. What was sent to a peer that dies, or that is
  disconnected, is lost silently; the layer above (channels) acknowledges what must not be lost.
* Backpressure: none. `send` never blocks; channels bound what is in flight by credits.
* `on_message` is never called from within `send`. A message that cannot be decoded is logged and
  dropped.
* Payloads are not to be changed after `send`: large arrays travel without a copy, and inline ones
  by reference. Nor after they were received: large arrays between processes of a node lie in memory
  that they share.
* Identity: the sender's name is what the connection declared; two live endpoints never share one. Who may connect at
  all: by Unix sockets whom file permissions let, by TCP members of the cluster, see `channels.security`.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from channels.errors import PeerLost, TooLarge
from channels.messages import Message

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 4 * 1024**3

OnMessage = Callable[[str, Message, Any], None]


class Transport(NamedTuple):
    """How payloads reach a peer, and why so."""

    name: str  # "inline", "cuda_ipc", "nccl", "shared_memory", "ipc", "tcp", or "tcp (…)" with how it is closed
    why: str


class Endpoint(Protocol):
    """See the module docstring for the contract."""

    name: str
    address: str
    remote_address: str  # where peers on other nodes find it; "" where it has no such place
    on_message: OnMessage
    max_payload_bytes: int  # of one that is packed, and of a list of packed ones

    def connect(self, peer: str, address: str) -> None:
        """Connect to a peer's mailbox. Idempotent; a new address replaces the old connection."""
        ...

    def disconnect(self, peer: str) -> None:
        """Forget a peer; what was sent and not delivered is dropped. Does nothing for an unknown
        one."""
        ...

    def pack(self, tree: Any) -> Any:
        """Make a payload ready to be sent, alone or inside others, any number of times.

        Raises TypeError for what cannot travel here, TooLarge beyond the limit. The receiver gets
        the tree itself.
        """
        ...

    def send(self, peer: str, message: Message, payload: Any = None) -> None:
        """Send a message. Raises PeerLost when not connected, Closed, and what `pack` raises."""
        ...

    def transport(self, peer: str) -> Transport:
        """How payloads reach a peer. Raises PeerLost when not connected."""
        ...

    def close(self) -> None:
        """Close mailbox and connections; what was sent before has half a second to leave."""
        ...


def unhandled(sender: str, message: Message, payload: Any) -> None:
    """The `on_message` of an endpoint that nobody gave one."""
    log.warning("dropped message sender=%s message=%r: no handler is set", sender, message)


def not_connected(name: str, peer: str) -> PeerLost:
    """What `send` raises to a peer that nobody connected to."""
    return PeerLost(f"{name} is not connected to {peer}: connect first, or it was disconnected")


def check_size(size: int, limit: int) -> None:
    """Raise TooLarge for a payload over the limit, with both in bytes."""
    if size > limit:
        raise TooLarge(f"a payload of {size} bytes is over the limit of {limit}: send it in parts")
