"""Tags of chunks in the clear: good once, for whom they were made, and for nothing else."""

import secrets
import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from channels.errors import BadFrame
from channels.security import KEY_BYTES, Security
from channels.tensors.tags import TagCheck, Tagger

HEAD = b"transfer, size, offset.."
DATA = memoryview(b"chunk of weights" * 100)


@pytest.fixture
def security() -> Security:
    return Security(secrets.token_bytes(KEY_BYTES), plain_bulk=True)


def test_what_was_marked_is_taken_in_its_order(security: Security) -> None:
    """Also where chunks between were lost: that shows in their transfer."""
    check = TagCheck(security)
    tagger = Tagger(security, "a", check.nonce)
    marks = [tagger.mark(HEAD, DATA[n:]) for n in range(4)]
    for number in (0, 1, 3):
        check.check("a", tagger.connection, HEAD, marks[number], DATA[number:])


@pytest.mark.parametrize("number", [0, 1])
def test_an_earlier_chunk_is_a_replay(security: Security, number: int) -> None:
    """The newest one again, and one from before it."""
    check = TagCheck(security)
    tagger = Tagger(security, "a", check.nonce)
    marks = [tagger.mark(HEAD, DATA) for _ in range(2)]
    for mark in marks:
        check.check("a", tagger.connection, HEAD, mark, DATA)
    with pytest.raises(BadFrame, match="a replay"):
        check.check("a", tagger.connection, HEAD, marks[number], DATA)


def test_an_older_connection_is_not_good_again_beside_a_newer_one(security: Security) -> None:
    """Its peer may have connected anew since; nothing that was recorded before works."""
    check = TagCheck(security)
    old, new = (Tagger(security, "a", check.nonce) for _ in range(2))
    recorded = old.mark(HEAD, DATA)
    check.check("a", old.connection, HEAD, recorded, DATA)
    check.check("a", new.connection, HEAD, new.mark(HEAD, DATA), DATA)
    with pytest.raises(BadFrame, match="a replay"):
        check.check("a", old.connection, HEAD, recorded, DATA)


def test_no_two_chunks_share_key_and_number(security: Security) -> None:
    """It would give the key away. A sender that is started anew counts from the same number, under another key."""
    nonce = TagCheck(security).nonce
    first, again = (Tagger(security, "a", nonce) for _ in range(2))
    marks = [first.mark(HEAD, DATA) for _ in range(3)]
    assert [int.from_bytes(mark[:8], "little") for mark in marks] == [1, 2, 3]
    assert len({mark[8:] for mark in (*marks, again.mark(HEAD, DATA))}) == 4


def test_tag_is_the_gmac_of_head_and_bytes(security: Security) -> None:
    """As the one-shot function makes it, of both in one piece under the number as nonce."""
    tagger = Tagger(security, "a", nonce := bytes(16))
    key = security.derive(b"bulk", nonce, b"a", tagger.connection)
    whole = struct.pack("<Q", len(HEAD)) + HEAD + bytes(DATA)
    expected = AESGCM(key).encrypt(struct.pack("<QI", 1, 0), b"", whole)
    assert tagger.mark(HEAD, DATA) == struct.pack("<Q", 1) + expected


def test_nothing_may_differ_from_what_was_marked(security: Security) -> None:
    """Bytes, length, head, where one ends and the other begins, number, name, connection, receiver, cluster."""
    check = TagCheck(security)
    tagger = Tagger(security, "a", check.nonce)
    mark = tagger.mark(HEAD, DATA)
    changed = bytearray(DATA)
    changed[700] ^= 1
    whole = HEAD + bytes(DATA)
    renumbered = struct.pack("<Q", 2) + mark[8:]
    other = Security(secrets.token_bytes(KEY_BYTES), plain_bulk=True)
    good = (check, "a", tagger.connection, HEAD, mark, DATA)
    for place, forged in (
        (5, memoryview(changed)),
        (5, DATA[:-1]),
        (3, b"Transfer, size, offset.."),
        (4, renumbered),
        (1, "b"),
        (2, secrets.token_bytes(16)),
        (0, TagCheck(security)),
        (0, TagCheck(other)),
    ):
        receiver, *arguments = (*good[:place], forged, *good[place + 1 :])
        with pytest.raises(BadFrame, match="a chunk whose tag"):
            receiver.check(*arguments)
    for length in (0, 23, 25):
        with pytest.raises(BadFrame, match="a chunk whose tag"):
            check.check("a", tagger.connection, whole[:length], mark, memoryview(whole)[length:])
    with pytest.raises(BadFrame, match="not the tag"):
        check.check("a", tagger.connection, HEAD, mark[:-1], DATA)
    check.check("a", tagger.connection, HEAD, mark, DATA)  # none of them used it up
