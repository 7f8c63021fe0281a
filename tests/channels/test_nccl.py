"""Links over NCCL: order, failure at both ends, and what they leave; then the real thing between two GPUs."""

import time
from collections.abc import Iterator
from concurrent.futures import Future

import msgspec
import pytest
import torch
from device_fakes import DEADLINE_S, FakeDevice, FakeNode
from device_peer import Peer, Peers
from test_cuda_ipc import EVERY_DTYPE, bits_of, example

from channels.errors import BadFrame, Closed, PeerLost
from channels.tensors.device_messages import LinkClosed
from channels.tensors.nccl import MAX_BYTES, NcclLinks, NcclPlace

LOST_S = 1.0  # a survivor knows by then


class Node:
    """A process with one GPU. What it posts waits until `deliver`."""

    def __init__(self, fabric: FakeNode, name: str, **settings: float) -> None:
        self.library = FakeDevice(fabric, f"GPU-{name}").nccl()
        self.posted: list[tuple[str, LinkClosed]] = []
        self.links = NcclLinks(
            name,
            self.library,
            lambda peer, message: self.posted.append((peer, message)),
            **settings,
        )


class Cluster:
    """Two nodes, a and b."""

    def __init__(self, **settings: float) -> None:
        node = FakeNode()
        self.fabric = node.fabric
        self.a, self.b = (Node(node, name, **settings) for name in "ab")

    def pass_on(self, tensor: torch.Tensor) -> tuple[Future[torch.Tensor], Future[torch.Tensor]]:
        """Send from a to b; what is done when it has left, and when it is there."""
        place, sent = self.a.links.send("b", tensor)
        return sent, self.b.links.receive("a", place)

    def deliver(self) -> None:
        """Bring what each end posted to the other."""
        for node, other in ((self.a, self.b), (self.b, self.a)):
            while node.posted:
                peer, message = node.posted.pop(0)
                assert peer == other.links.name
                other.links.closed(node.links.name, message)

    def aborted(self, count: int) -> None:
        """So many communicators were ever made, and all are gone."""
        communicators = self.fabric.communicators
        assert len(communicators) == count
        for communicator in communicators:
            assert communicator.aborted.wait(DEADLINE_S)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.a.links.close()
    cluster.b.links.close()
    cluster.aborted(len(cluster.fabric.communicators))


def lost(future: Future[torch.Tensor], match: str) -> None:
    """It fails soon, with PeerLost."""
    with pytest.raises(PeerLost, match=match):
        future.result(timeout=LOST_S)


def until_posted(node: Node) -> LinkClosed:
    deadline = time.monotonic() + DEADLINE_S
    while not node.posted:
        assert time.monotonic() < deadline
        time.sleep(0.001)  # what posts is a thread of its own
    return node.posted[0][1]


def test_tensors_arrive_in_order_bit_by_bit(cluster: Cluster) -> None:
    """Over one pair of communicators; the other direction has its own."""
    sent = [example(dtype) for dtype in EVERY_DTYPE]
    passed = [cluster.pass_on(tensor) for tensor in sent]
    for tensor, (left, arriving) in zip(sent, passed, strict=True):
        arrived = arriving.result(timeout=DEADLINE_S)
        assert arrived.dtype == torch.uint8
        assert torch.equal(arrived, bits_of(tensor))
        assert left.result(timeout=DEADLINE_S) is tensor
    assert len(cluster.fabric.communicators) == 2
    assert cluster.a.links.statistics() == {
        "to b": {"bytes": sum(tensor.nbytes for tensor in sent), "pending": 0}
    }
    place, _ = cluster.b.links.send("a", torch.ones(3))
    back = cluster.a.links.receive("b", place).result(timeout=DEADLINE_S)
    assert torch.equal(back.view(torch.float32), torch.ones(3))
    assert len(cluster.fabric.communicators) == 4
    with pytest.raises(ValueError, match="make it contiguous"):
        cluster.a.links.send("b", torch.ones(3, 3).t())
    with pytest.raises(ValueError, match="leave out empty"):
        cluster.a.links.send("b", torch.ones(0))


def test_a_tensor_is_sent_when_the_current_streams_work_is_done(cluster: Cluster) -> None:
    """Or at the event that is given. What arrives has memory that nothing reads."""
    stream = cluster.a.library.gpu.main
    stream.work()
    before = cluster.a.library.now()
    stream.work()
    place, left = cluster.a.links.send("b", torch.ones(3), before)
    cluster.b.links.receive("a", place)
    cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S)
    left.result(timeout=DEADLINE_S)
    (pair,) = cluster.fabric.pairs.values()
    sender, receiver = sorted(pair.ranks, key=lambda each: each.rank)
    assert [after.point for after in sender.after] == [1, 2]
    assert receiver.after == []


def test_a_peer_that_died_fails_what_is_pending(cluster: Cluster) -> None:
    """At once, whether it was connecting or transferring; the next tensor takes a new link."""
    cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S)
    (pair,) = cluster.fabric.pairs.values()
    pair.stuck = True
    left, arriving = cluster.pass_on(torch.ones(3))
    place, never_asked_for = cluster.a.links.send("b", torch.ones(3))
    cluster.a.links.peer_gone("b")
    lost(left, "to b: the process is gone")
    lost(never_asked_for, "to b: the process is gone")
    cluster.b.links.peer_gone("a")
    lost(arriving, "from a: the process is gone")
    cluster.aborted(2)
    first = msgspec.msgpack.decode(place, type=NcclPlace)
    place, _ = cluster.a.links.send("b", torch.zeros(3))
    second = msgspec.msgpack.decode(place, type=NcclPlace)
    assert second.generation > first.generation
    assert second.unique_id != first.unique_id
    assert second.sequence == 0
    arrived = cluster.b.links.receive("a", place).result(timeout=DEADLINE_S)
    assert torch.equal(arrived.view(torch.float32), torch.zeros(3))


def test_a_peer_that_died_while_connecting(cluster: Cluster) -> None:
    """The other rank never comes; the thread is not left behind in NCCL."""
    _, sent = cluster.a.links.send("b", torch.ones(3))
    cluster.a.links.peer_gone("b")
    lost(sent, "the process is gone")
    cluster.a.links.peer_gone("b")  # also when it is known


@pytest.mark.parametrize("stuck", [True, False])
def test_a_transfer_has_a_deadline(stuck: bool) -> None:
    """A peer that hangs, or that never asks for what it was sent, and that nobody misses."""
    cluster = Cluster(deadline_s=0.1)
    if stuck:
        cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S)
        next(iter(cluster.fabric.pairs.values())).stuck = True
        left, arriving = cluster.pass_on(torch.ones(3))
        lost(arriving, r"from a: no answer within 0\.1 s")
    else:
        _, left = cluster.a.links.send("b", torch.ones(3))
    lost(left, r"to b: no answer within 0\.1 s")
    told = until_posted(cluster.a)
    assert (told.outgoing, told.reason) == (True, "no answer within 0.1 s")
    cluster.deliver()
    cluster.aborted(2 if stuck else 1)
    for node in (cluster.a, cluster.b):
        node.links.close()


def test_a_failure_at_one_end_reaches_the_other(cluster: Cluster) -> None:
    """NCCL tells only who was looking."""
    cluster.b.library.refuses = "no more memory"
    left, arriving = cluster.pass_on(torch.ones(3))
    lost(arriving, "from a: no more memory")
    until_posted(cluster.b)
    assert not left.done()
    cluster.deliver()
    lost(left, "to b: the other end failed: no more memory")
    cluster.b.library.refuses = ""
    assert cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S).nbytes == 12


def test_an_error_of_the_network_ends_the_link(cluster: Cluster) -> None:
    """Seen by asking NCCL, while the device would wait for ever."""
    cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S)
    (pair,) = cluster.fabric.pairs.values()
    pair.stuck = True
    left, arriving = cluster.pass_on(torch.ones(3))
    pair.broken = "remote process exited"
    lost(left, "to b: remote process exited")
    lost(arriving, "from a: remote process exited")
    cluster.aborted(2)


def test_an_idle_link_is_taken_down_at_both_ends() -> None:
    """And made anew when there is something to send; nothing was lost in between."""
    cluster = Cluster(idle_s=0.02)
    for made in (2, 4):
        left, arriving = cluster.pass_on(torch.ones(3))
        assert torch.equal(arriving.result(timeout=DEADLINE_S).view(torch.float32), torch.ones(3))
        left.result(timeout=DEADLINE_S)
        assert until_posted(cluster.a) == LinkClosed(
            generation=until_posted(cluster.a).generation, outgoing=True
        )
        assert not cluster.a.links.statistics()
        cluster.deliver()
        cluster.aborted(made)
        assert not cluster.b.posted
    for node in (cluster.a, cluster.b):
        node.links.close()


def test_no_room_for_what_comes_ends_the_link_at_both_ends(cluster: Cluster) -> None:
    """It cannot be passed over: the device pairs what is sent and what is asked for by order alone."""
    cluster.b.library.memory_bytes = 10
    left, arriving = cluster.pass_on(torch.ones(3))
    lost(arriving, "no room for 12 bytes at b")
    cluster.deliver()
    lost(left, "the other end failed: no room for 12 bytes at b")
    left, arriving = cluster.pass_on(torch.ones(2))
    assert arriving.result(timeout=DEADLINE_S).nbytes == 8


def test_a_gap_ends_the_link_at_both_ends(cluster: Cluster) -> None:
    """The device pairs sends and receives by order alone: after a gap, every tensor would be another one."""
    cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S)
    _, first = cluster.a.links.send("b", torch.ones(3))
    place, second = cluster.a.links.send("b", torch.ones(3))
    lost(cluster.b.links.receive("a", place), "tensor 2 came where 1 was next")
    late, third = cluster.a.links.send("b", torch.ones(3))
    lost(cluster.b.links.receive("a", late), "where 1 was next")
    cluster.deliver()
    for future in (first, second, third):
        lost(future, "the other end failed: tensor 2 came")
    assert cluster.pass_on(torch.ones(3))[1].result(timeout=DEADLINE_S).nbytes == 12
    lost(cluster.b.links.receive("a", late), "its link is over")


PLACE = NcclPlace(bytes(128), 1, 0, 4)


@pytest.mark.parametrize(
    "place",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(msgspec.structs.replace(PLACE, unique_id=bytes(127))),
        msgspec.msgpack.encode(msgspec.structs.replace(PLACE, generation=-1)),
        msgspec.msgpack.encode(msgspec.structs.replace(PLACE, sequence=-1)),
        msgspec.msgpack.encode(msgspec.structs.replace(PLACE, nbytes=0)),
        msgspec.msgpack.encode(msgspec.structs.replace(PLACE, nbytes=MAX_BYTES + 1)),
    ],
)
def test_a_place_that_is_none_is_a_bad_frame(cluster: Cluster, place: bytes) -> None:
    """Nothing is connected for it."""
    with pytest.raises(BadFrame):
        cluster.b.links.receive("a", place)
    assert not cluster.fabric.communicators


def test_closing_fails_what_is_pending(cluster: Cluster) -> None:
    """And ends the threads."""
    _, sent = cluster.a.links.send("b", torch.ones(3))
    cluster.a.links.close()
    lost(sent, "a was closed")
    cluster.aborted(len(cluster.fabric.communicators))
    with pytest.raises(Closed):
        cluster.a.links.send("b", torch.ones(3))
    with pytest.raises(Closed):
        cluster.a.links.receive("b", msgspec.msgpack.encode(PLACE))


GIB = 1 << 30
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


def passed(a: Peer, b: Peer, name: str, dtype: str, nbytes: int, seed: int) -> None:
    """One tensor from a to b, whole."""
    b.ask("receive", "a", name, a.ask("send", "b", name, dtype, nbytes, seed))
    assert b.ask("outcome", name) == "done"
    assert b.ask("check", dtype, seed)
    assert a.ask("outcome", name) == "done"


@pytest.mark.gpu
@two_gpus
def test_real_gpus_every_dtype_and_a_gib() -> None:
    """Each process sees one GPU; both directions."""
    with Peers() as peers:
        a, b = peers.start("a", "0"), peers.start("b", "1")
        for seed, dtype in enumerate(EVERY_DTYPE):
            passed(a, b, "small", str(dtype).removeprefix("torch."), 48000, seed)
        passed(a, b, "large", "uint8", GIB, 1)
        a.ask("receive", "b", "back", b.ask("send", "a", "back", "float32", 4000, 3))
        assert a.ask("outcome", "back") == "done"
        assert a.ask("check", "float32", 3)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("survivor", ["sender", "receiver"])
def test_real_gpus_a_killed_peer(connected: bool, survivor: str) -> None:
    """While the device of the survivor waits for it: an error within a second of the news, and a new link works."""
    with Peers() as peers:
        a, b = peers.start("a", "0"), peers.start("b", "1")
        if connected:
            passed(a, b, "first", "float32", 1 << 20, 0)
        place = a.ask("send", "b", "never", "uint8", GIB, 1)
        living, dead, name = (a, b, "b") if survivor == "sender" else (b, a, "a")
        if living is b:
            a.kill()  # before it can send, and b asks for what will never come
            b.ask("receive", "a", "never", place)
        dead.kill()
        begin = time.monotonic()
        living.ask("gone", name)
        assert "PeerLost" in living.ask("outcome", "never")
        assert time.monotonic() - begin < LOST_S
        assert living.ask("facts")["computes"] == 1000
        again = peers.start(name, "1" if name == "b" else "0")
        pair = (a, again) if living is a else (again, b)
        passed(*pair, "next", "float32", 1 << 20, 2)


@pytest.mark.gpu
@two_gpus
def test_real_gpus_a_peer_killed_in_the_middle() -> None:
    """Of thirty GiB on their way: what had left is done, and the rest lost."""
    with Peers() as peers:
        a, b = peers.start("a", "0"), peers.start("b", "1")
        passed(a, b, "first", "float32", 1 << 20, 0)
        names = [f"item-{i}" for i in range(30)]
        for name in names:
            place = a.ask("send", "b", name, "uint8", GIB, 1)
            if name != names[-1]:
                b.tell("receive", "a", name, place)
        b.kill()
        begin = time.monotonic()
        a.ask("gone", "b")
        outcomes = [a.ask("outcome", name) for name in names]
        assert time.monotonic() - begin < LOST_S
        assert "PeerLost" in outcomes[-1]
        lost_first = outcomes.index(outcomes[-1])
        assert outcomes == ["done"] * lost_first + [outcomes[-1]] * (30 - lost_first)
        assert a.ask("facts")["computes"] == 1000
