"""Endpoints in one event loop, for jobs in one process and for tests."""

import asyncio
from collections import deque
from typing import Any

from channels.endpoint import (
    MAX_PAYLOAD_BYTES,
    OnMessage,
    Transport,
    check_size,
    not_connected,
    unhandled,
)
from channels.errors import ChannelError, Closed
from channels.messages import Message
from channels.sizes import size_bytes

INLINE_PER_TURN = 128


class InlineHub:
    """Endpoints in one event loop. Payloads travel by reference; delivery is by the loop, never
    from `send`."""

    def __init__(self, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self.max_payload_bytes = max_payload_bytes
        self._count = 0
        self.mailboxes: dict[str, InlineEndpoint] = {}
        # What was sent before the receiver existed; between processes it would wait in the
        # connection as well.
        self.early: dict[str, list[tuple[str, Message, Any]]] = {}
        self.closed: set[str] = set()

    def endpoint(self, name: str, address: str | None = None) -> "InlineEndpoint":
        """A new endpoint on the running loop, by default with an address of its own."""
        self._count += 1
        return InlineEndpoint(self, name, address or f"inline://{name}.{self._count}")


class InlineEndpoint:
    """An endpoint of an `InlineHub`."""

    def __init__(self, hub: InlineHub, name: str, address: str) -> None:
        if address in hub.mailboxes:
            raise ChannelError(f"{address} is taken: choose another address for {name}")
        self.name = name
        self.address = address
        self.remote_address = ""
        self.on_message: OnMessage = unhandled
        self.max_payload_bytes = hub.max_payload_bytes
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._peers: dict[str, str] = {}
        self._inbox: deque[tuple[str, Message, Any]] = deque()
        self._scheduled = False
        self._closed = False
        hub.mailboxes[address] = self
        hub.closed.discard(address)
        for sender, message, tree in hub.early.pop(address, []):
            self._deliver(sender, message, tree)

    def connect(self, peer: str, address: str) -> None:
        if self._closed:
            raise Closed(f"endpoint {self.name} is closed")
        self._peers[peer] = address

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def pack(self, tree: Any) -> Any:
        # What does not travel between processes is not to pass here unseen.
        check_size(size_bytes(tree), self.max_payload_bytes)
        return tree

    def transport(self, peer: str) -> Transport:
        if peer not in self._peers:
            raise not_connected(self.name, peer)
        return Transport("inline", "same process: by reference")

    def send(self, peer: str, message: Message, payload: Any = None) -> None:
        address = self._peers.get(peer)
        if address is None:
            if self._closed:
                raise Closed(f"endpoint {self.name} is closed")
            raise not_connected(self.name, peer)
        mailbox = self._hub.mailboxes.get(address)
        if mailbox is not None:
            mailbox._deliver(self.name, message, payload)
        elif address not in self._hub.closed:
            self._hub.early.setdefault(address, []).append((self.name, message, payload))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._peers.clear()
        self._inbox.clear()
        del self._hub.mailboxes[self.address]
        self._hub.closed.add(self.address)

    def _deliver(self, sender: str, message: Message, tree: Any) -> None:
        self._inbox.append((sender, message, tree))
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        for _ in range(min(len(self._inbox), INLINE_PER_TURN)):
            if self._closed:
                return
            sender, message, tree = self._inbox.popleft()
            try:
                self.on_message(sender, message, tree)
            except Exception as error:
                self._loop.call_exception_handler(
                    {"message": "a handler of received messages failed", "exception": error}
                )
        if self._inbox:
            self._schedule()
