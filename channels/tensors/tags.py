"""Tags of chunks that cross a private network in the clear: who sent them, in which order, and that none was changed.

A tag is an HMAC-SHA256 over the chunk's number on its connection, its head (transfer, bytes of the whole, offset) and
its bytes. Its key is made from the cluster key, the receiver's nonce, the sender's name and the connection's own
number, so that a tag is good once: not at another receiver, nor at the same one started anew (another nonce), for
another sender, on another connection, or a second time (numbers only rise). A chunk that is left out leaves a hole in
its transfer, which is refused there.

HMAC-SHA256 because of what Python's own library has it is the fastest on processors that have SHA instructions, as
servers do: 1.8 GB/s where keyed BLAKE2b made 0.9, BLAKE2s 0.5 and HMAC-SHA512 0.85 (EPYC Zen 3, 1 MiB chunks).
"""

import hmac
import secrets
import struct
from typing import Any

from channels.errors import BadFrame
from channels.security import Security

NONCE_BYTES = 16
CONNECTION_BYTES = 16

_BEGIN = struct.Struct("<QQ")  # number, bytes of the head
_MARK = struct.Struct("<Q32s")  # number, tag


class Tagger:
    """The sender's side of one connection. name: of the sender    nonce: of the receiver"""

    def __init__(self, security: Security, name: str, nonce: bytes) -> None:
        self.connection = secrets.token_bytes(CONNECTION_BYTES)
        self._keyed = _keyed(security, name, self.connection, nonce)
        self._number = 0

    def mark(self, head: bytes, data: memoryview) -> bytes:
        """What goes with the next chunk."""
        self._number += 1
        return _MARK.pack(self._number, _tag(self._keyed, self._number, head, data))


class TagCheck:
    """The receiver's side of all connections to it. `nonce` is told to senders."""

    def __init__(self, security: Security) -> None:
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self._security = security
        # Key and newest number of each connection. None is ever forgotten, or what was sent on it would be good again;
        # only members add to them, one for each time that they connect.
        self._known: dict[tuple[str, bytes], tuple[Any, int]] = {}

    def check(
        self, sender: str, connection: bytes, head: bytes, mark: bytes, data: memoryview
    ) -> None:
        """Raises BadFrame for a chunk that the sender did not send just now."""
        try:
            number, tag = _MARK.unpack(mark)
        except struct.error as error:
            raise BadFrame(f"not the tag of a chunk: {error}") from error
        known = self._known.get((sender, connection))
        if known is None:
            known = _keyed(self._security, sender, connection, self.nonce), 0
        keyed, newest = known
        if not hmac.compare_digest(tag, _tag(keyed, number, head, data)):
            raise BadFrame("a chunk whose tag is not of this cluster, or which was changed")
        if number <= newest:
            raise BadFrame(f"chunk {number} of a connection after its chunk {newest}: a replay")
        self._known[sender, connection] = keyed, number


def _keyed(security: Security, sender: str, connection: bytes, nonce: bytes) -> Any:
    key = security.derive(b"bulk", nonce, sender.encode(), connection)
    return hmac.new(key, digestmod="sha256")


def _tag(keyed: Any, number: int, head: bytes, data: memoryview) -> bytes:
    hashed = keyed.copy()
    hashed.update(_BEGIN.pack(number, len(head)) + head)
    hashed.update(data)
    digest: bytes = hashed.digest()
    return digest
