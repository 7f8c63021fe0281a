"""Who may come in over TCP: members of one cluster, by a secret that they share.

From the secret come, each by a keyed hash, a CURVE key pair of every mailbox, another one of every connection, and the
keys of the tags of `channels.tensors.tags`. A client needs the mailbox's public key to be heard at all, and the
secret half of the one pair that the `_Gate` admits. Members are not kept apart: whoever has the secret may take any
name, as it may run anything on the cluster anyway.
"""

import hashlib
import logging
import threading
from typing import ClassVar

import msgspec
import zmq
from zmq.utils import z85

log = logging.getLogger(__name__)

KEY_BYTES = 32

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # where libzmq asks, in each context


class Security(msgspec.Struct, frozen=True):
    """What makes a process a member of a cluster. It prints without the key.

    plain_bulk: large frames from and to others that say so too are authenticated, and not enciphered. For private
    networks: whoever listens there can read weights and data.
    """

    key: bytes
    plain_bulk: bool = False

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a cluster key of {len(self.key)} bytes: it has {KEY_BYTES}")

    def __repr__(self) -> str:
        return f"Security(cluster={self.cluster}, plain_bulk={self.plain_bulk})"

    @property
    def cluster(self) -> str:
        """A name of the cluster that says nothing about its key."""
        return self.derive(b"cluster").hex()[:12]

    def derive(self, *purpose: bytes) -> bytes:
        """32 bytes for one purpose, from which neither the key nor those for another one can be found."""
        hashed = hashlib.blake2b(key=self.key, digest_size=KEY_BYTES)
        for part in purpose:
            hashed.update(len(part).to_bytes(8, "little") + part)
        return hashed.digest()

    def guard(self, mailbox: "zmq.Socket[bytes]") -> None:
        """Have a socket that is not bound yet take connections of members only, enciphered."""
        _, secret = self._pair(b"mailbox")
        admitted, _ = self._pair(b"connection")
        _Gate.of(mailbox.context).admit(self.cluster, z85.decode(admitted))
        mailbox.setsockopt(zmq.CURVE_SERVER, 1)
        mailbox.setsockopt(zmq.CURVE_SECRETKEY, secret)
        mailbox.setsockopt_string(zmq.ZAP_DOMAIN, self.cluster)
        # Without it libzmq admits everyone where nobody answers for the gate.
        mailbox.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def identify(self, connection: "zmq.Socket[bytes]") -> None:
        """Have a socket that is not connected yet speak to mailboxes of members only, enciphered."""
        server, _ = self._pair(b"mailbox")
        public, secret = self._pair(b"connection")
        connection.setsockopt(zmq.CURVE_SERVERKEY, server)
        connection.setsockopt(zmq.CURVE_PUBLICKEY, public)
        connection.setsockopt(zmq.CURVE_SECRETKEY, secret)

    def _pair(self, purpose: bytes) -> tuple[bytes, bytes]:
        """A CURVE key pair, public and secret, as libzmq takes them."""
        secret = z85.encode(self.derive(b"curve", purpose))
        return zmq.curve_public(secret), secret


class _Gate:
    """Answers libzmq for all sockets of a context whether a client may come in (ZAP, rfc.zeromq.org/spec/27).

    In a thread of its own, which sleeps but for handshakes: endpoints of several loops may share the context, and a
    handshake does not wait for a busy loop.
    """

    _of_context: ClassVar[dict["zmq.Context[zmq.Socket[bytes]]", "_Gate"]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._admitted: dict[bytes, bytes] = {}  # public key by domain
        socket = context.socket(zmq.REP)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(_ZAP_ENDPOINT)
        threading.Thread(target=self._serve, args=(socket,), name="zap", daemon=True).start()

    @classmethod
    def of(cls, context: "zmq.Context[zmq.Socket[bytes]]") -> "_Gate":
        with cls._lock:
            gate = cls._of_context.get(context)
            if gate is None:
                gate = cls._of_context[context] = cls(context)
            return gate

    def admit(self, domain: str, public_key: bytes) -> None:
        self._admitted[domain.encode()] = public_key

    def _serve(self, socket: "zmq.Socket[bytes]") -> None:
        try:
            while True:
                version, request, domain, _, _, mechanism, *credentials = socket.recv_multipart()
                known = self._admitted.get(domain)
                admitted = mechanism == b"CURVE" and known is not None and credentials == [known]
                status = (b"200", b"OK") if admitted else (b"400", b"not of this cluster")
                socket.send_multipart([version, request, *status, b"", b""])
        except zmq.ContextTerminated:
            socket.close()
