"""Frames between flowd and the zygote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowd import zygote_messages
from flowd.zygote_messages import (
    FrameReader,
    List,
    Signal,
    Spawn,
    Stop,
    encode_frame,
    request_decoder,
)

REQUESTS = [
    Spawn(
        spawn_id="a",
        name="env-0",
        entry="module:function",
        argument=b"\0\xff" * 500,
        argument_is_json=False,
        environment={"A": "1", "B": None},
        log_path="/log",
    ),
    Signal(pid=7, signum=15),
    List(),
    Stop(deadline_s=1.5),
]


@given(st.lists(st.integers(min_value=1, max_value=200), max_size=30))
def test_frames_survive_any_fragmentation(sizes):
    """However the stream is cut, the same messages come out in the same order."""
    stream = b"".join(encode_frame(request) for request in REQUESTS)
    reader = FrameReader()
    received = []
    for size in [*sizes, len(stream)]:
        piece, stream = stream[:size], stream[size:]
        received += [request_decoder.decode(body) for body in reader.feed(piece)]
    assert received == REQUESTS


def test_frame_over_the_limit_is_refused_at_both_ends(monkeypatch):
    """A length that cannot be true is not waited for; a sender says what is too large."""
    with pytest.raises(ValueError, match=r"announces 4294967295 bytes.*does not speak"):
        list(FrameReader().feed(b"\xff\xff\xff\xff"))
    monkeypatch.setattr(zygote_messages, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ValueError, match=r"a Spawn message has \d+ bytes, the limit is 100"):
        encode_frame(REQUESTS[0])
