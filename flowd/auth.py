"""The cluster key: a file in the state directory for its owner alone, and the token that carries it to other nodes.

The file holds the token, so there is one form of both. Whoever has the token is a member: it opens every socket of the
cluster, for good. A new key (remove the file, start all nodes again) ends that.
"""

import base64
import binascii
import hashlib
import os
import secrets
import stat
from pathlib import Path

from channels.security import KEY_BYTES
from flowd.errors import RequestError

FILE_MODE = 0o600
_PREFIX = "flowd1-"
_CHECK_BYTES = 3  # a mistyped token is told from one of another cluster
MAX_TOKEN_BYTES = 4096


def token_of(key: bytes) -> str:
    """The token that carries a key: letters, digits, "-" and "_"."""
    return _PREFIX + base64.urlsafe_b64encode(key + _check(key)).decode()


def key_of(token: str) -> bytes:
    """The key that a token carries; RequestError, without the token in it, for what is none."""
    word = token.strip()
    if not word.startswith(_PREFIX):
        raise RequestError(
            f'a token of {len(word)} characters that does not begin with "{_PREFIX}": '
            "give the whole line that `flowd token` prints on a node of the cluster"
        )
    try:
        data = base64.b64decode(word.removeprefix(_PREFIX), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    key = data[:KEY_BYTES]
    if len(data) != KEY_BYTES + _CHECK_BYTES or data[KEY_BYTES:] != _check(key):
        raise RequestError(
            f"the token of {len(word)} characters is damaged: copy the whole line that "
            "`flowd token` prints on a node of the cluster"
        )
    return key


def cluster_key(path: Path) -> bytes:
    """The key in a state directory, made on first need.

    RequestError for a file that others can read or write, that is not ours, or that holds no key.
    """
    try:
        return _read(path)
    except FileNotFoundError:
        return adopt(path, secrets.token_bytes(KEY_BYTES))
    except OSError as error:
        raise _unusable(path, error) from None


def adopt(path: Path, key: bytes) -> bytes:
    """Make a key that of the state directory; the one that another process made just before stays.

    Returns what is there now. RequestError when it cannot be written, and as `cluster_key`.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            with open(descriptor, "w") as file:
                file.write(token_of(key) + "\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, path)  # unlike a rename it replaces nothing
            except FileExistsError:
                pass
        finally:
            fresh.unlink()
        return _read(path)
    except OSError as error:
        raise _unusable(path, error) from None


def join(path: Path, token: str) -> None:
    """Take the key of a cluster into a state directory; RequestError where another one is there."""
    key = key_of(token)
    if adopt(path, key) != key:
        raise RequestError(
            f"{path} holds the key of another cluster than the token: choose another --state-dir, "
            "or stop flowd and remove that file"
        )


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(descriptor, encoding="ascii", errors="replace") as file:
        found = os.fstat(descriptor)
        mode = stat.S_IMODE(found.st_mode)
        if mode & 0o077 or found.st_uid != os.getuid():
            raise RequestError(
                f"{path} has mode {mode:04o} and belongs to user {found.st_uid}: the cluster key is "
                f"for your eyes only; `chmod 600 {path}`, and where others may have read it, "
                "remove it on all nodes for a new one"
            )
        text = file.read(MAX_TOKEN_BYTES)
    try:
        return key_of(text)
    except RequestError as error:
        raise RequestError(f"{path} holds no cluster key: {error}") from error


def _check(key: bytes) -> bytes:
    return hashlib.sha256(b"flowd token" + key).digest()[:_CHECK_BYTES]


def _unusable(path: Path, error: OSError) -> RequestError:
    return RequestError(
        f"the cluster key {path} cannot be used ({error.strerror}): name a state directory of your "
        "own with --state-dir or FLOWD_HOME"
    )
