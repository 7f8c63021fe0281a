"""The base of every typed message, and its bytes: one wire-version byte, then MessagePack.

A message is a frozen struct with a tag; it is encoded as an array whose first element is the tag,
so a field's position is its name on the wire: new fields come last and have defaults, fields are
never reordered or removed. Decoding is typed, and sees every message class that has been imported
by then.
"""

from functools import reduce
from operator import or_
from typing import Any

import msgspec

from channels.errors import BadFrame, TooLarge

WIRE_VERSION = 1
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_VERSION_BYTE = bytes([WIRE_VERSION])


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What one endpoint says to another. Subclasses declare `tag="..."`, unique among all."""


class _Registry:
    """The decoder of the union of all tagged message classes; made anew when classes were imported
    since."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Message]] = {}
        self._decoder: msgspec.msgpack.Decoder[Any] | None = None

    def refresh(self) -> bool:
        """Take in classes that were imported since. Returns whether there were any."""
        classes: dict[str, type[Message]] = {}
        pending: list[type[Message]] = [Message]
        while pending:
            cls = pending.pop()
            pending.extend(cls.__subclasses__())
            tag = cls.__struct_config__.tag
            if tag is None:
                continue
            known = classes.setdefault(str(tag), cls)
            if known is not cls:
                raise TypeError(
                    f"messages {known.__module__}.{known.__qualname__} and {cls.__module__}."
                    f'{cls.__qualname__} share the tag "{tag}": tags are unique, rename one'
                )
        if classes == self._classes:
            return False
        self._classes = classes
        self._decoder = msgspec.msgpack.Decoder(reduce(or_, classes.values()))
        return True

    def decode(self, data: memoryview) -> Message:
        if self._decoder is None and not self.refresh():
            raise BadFrame("no message class is imported, so nothing can be decoded")
        try:
            return self._decode(data)
        except msgspec.ValidationError as error:
            if not self.refresh():  # only an unknown tag of a class imported since is worth a retry
                raise BadFrame(f"not a message known here: {error}") from error
        except msgspec.DecodeError as error:
            raise BadFrame(f"not a message: {error}") from error
        try:
            return self._decode(data)
        except msgspec.DecodeError as error:
            raise BadFrame(f"not a message known here: {error}") from error

    def _decode(self, data: memoryview) -> Message:
        assert self._decoder is not None
        message: Message = self._decoder.decode(data)
        return message


_registry = _Registry()
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """The bytes of a message. Raises TooLarge beyond MAX_MESSAGE_BYTES, TypeError for a class
    without a tag."""
    if type(message).__struct_config__.tag is None:
        raise TypeError(f'{type(message).__qualname__} has no tag: declare it with tag="..."')
    data = _VERSION_BYTE + _encoder.encode(message)
    if len(data) > MAX_MESSAGE_BYTES:
        raise TooLarge(
            f"a {type(message).__qualname__} of {len(data)} bytes is over the limit of "
            f"{MAX_MESSAGE_BYTES}: send bulk as the payload"
        )
    return data


def decode(data: bytes | memoryview) -> Message:
    """The message that bytes stand for. Raises BadFrame for anything that is not one, unknown tags
    included."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise BadFrame(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    if not data or data[0] != WIRE_VERSION:
        version = data[0] if data else "none"
        raise BadFrame(
            f"wire version {version}, but this side speaks {WIRE_VERSION}: "
            "run one flowd version on all nodes"
        )
    return _registry.decode(memoryview(data)[1:])
