"""Bytes of typed messages."""

import msgspec
import pytest

from channels import messages
from channels.errors import BadFrame, TooLarge
from channels.messages import WIRE_VERSION, Message


class Greeting(Message, frozen=True, tag="test_greeting"):
    """A message of these tests."""

    name: str
    count: int = 1


def raw(*values: object) -> bytes:
    """The bytes of a message with these array elements."""
    return bytes([WIRE_VERSION]) + msgspec.msgpack.encode(values)


def test_message_comes_back_as_it_was() -> None:
    """Class and fields survive."""
    assert messages.decode(messages.encode(Greeting(name="a", count=3))) == Greeting(
        name="a", count=3
    )


def test_class_that_was_imported_after_a_decode_is_known() -> None:
    """The registry looks again before it calls a tag unknown."""
    messages.decode(messages.encode(Greeting(name="a")))

    class Late(Message, frozen=True, tag="test_late"):
        value: int

    assert messages.decode(messages.encode(Late(value=2))) == Late(value=2)


def test_older_sender_leaves_new_fields_at_their_default() -> None:
    """Fields that come last with defaults may be absent."""
    assert messages.decode(raw("test_greeting", "old")) == Greeting(name="old", count=1)


def test_newer_sender_may_send_fields_we_do_not_know() -> None:
    """What comes after the known fields is ignored."""
    assert messages.decode(raw("test_greeting", "new", 2, "later")) == Greeting(name="new", count=2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "wire version none"),
        (b"\x63\x90", "wire version 99"),
        (bytes([WIRE_VERSION]), "not a message"),
        (bytes([WIRE_VERSION]) + b"\xc1 garbage", "not a message"),
        (raw("test_nobody_knows"), "test_nobody_knows"),
        (raw("test_greeting"), "missing|length"),
        (raw("test_greeting", 5), "str"),
        (raw(), "not a message"),
        (raw("test_greeting", "x") + b"\x00", "not a message"),
    ],
)
def test_anything_else_is_a_bad_frame(data: bytes, reason: str) -> None:
    """Garbage, unknown tags, wrong types, other versions: one error class, and a reason."""
    with pytest.raises(BadFrame, match=reason):
        messages.decode(data)


def test_message_over_the_limit_is_refused_on_both_sides() -> None:
    """The sender hears both sizes; a receiver does not even parse it."""
    text = "x" * messages.MAX_MESSAGE_BYTES
    with pytest.raises(TooLarge, match=rf"over the limit of {messages.MAX_MESSAGE_BYTES}"):
        messages.encode(Greeting(name=text))
    with pytest.raises(BadFrame, match="over the limit"):
        messages.decode(raw("test_greeting", text))


def test_message_without_a_tag_cannot_be_sent() -> None:
    """Abstract classes are not messages."""

    class Untagged(Message, frozen=True):
        pass

    with pytest.raises(TypeError, match="has no tag"):
        messages.encode(Untagged())
