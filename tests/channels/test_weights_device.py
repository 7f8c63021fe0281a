"""Weights from one GPU's memory into another process's tensors; without a GPU, with memory that behaves so."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from device_fakes import FakeDevice, FakeNode
from weights_device_peer import make_device, make_state

from channels.errors import BadFrame, ChannelError, WeightsMismatch
from channels.messages import decode, encode
from channels.tensors.errors import DeviceUnreachable
from channels.weights.delta import checksum
from channels.weights.device import (
    ALIGNMENT_BYTES,
    NUM_BUCKETS,
    DevicePublisher,
    DeviceReceiver,
    WeightsBucket,
    WeightsBucketTaken,
    cut,
)

BUCKET_BYTES = 64 * ALIGNMENT_BYTES  # the embedding needs four
PATIENCE_S = 20.0
VERSIONS = 20


@dataclass
class Process:
    """A receiver's, and what it said."""

    process: subprocess.Popen[bytes]
    connection: Connection
    reports: list[Any] = field(default_factory=list)


class Processes:
    """A publisher here, receivers in processes of their own."""

    def __init__(self, directory: Path, here: str, there: list[str]) -> None:
        self.device = make_device(here, "GPU-publisher")
        self.publisher = DevicePublisher(self.device, self._send, BUCKET_BYTES)
        self.processes: dict[str, Process] = {}
        self.threads = []
        program = str(Path(__file__).with_name("weights_device_peer.py"))
        address = str(directory / "socket")
        with Listener(address) as listener:
            for number, device in enumerate(there):
                process = subprocess.Popen([sys.executable, program, address, device])
                name = f"rollout-{number}"
                self.processes[name] = Process(process, listener.accept())
                self.publisher.add_receiver(name)
                thread = threading.Thread(target=self._listen, args=(name,))
                thread.start()
                self.threads.append(thread)

    def _send(self, name: str, bucket: WeightsBucket) -> None:
        try:
            self.processes[name].connection.send_bytes(encode(bucket))
        except OSError:
            pass  # it died; the thread that listens says so

    def _listen(self, name: str) -> None:
        one = self.processes[name]
        try:
            while True:
                message = decode(one.connection.recv_bytes())
                one.reports.append(one.connection.recv())
                assert isinstance(message, WeightsBucketTaken)
                self.publisher.taken(name, message)
        except (EOFError, OSError):
            one.process.wait(PATIENCE_S)
            self.publisher.remove_receiver(name)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.processes.values():
            one.process.terminate()
        for thread in self.threads:
            thread.join(PATIENCE_S)
        self.publisher.close()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.mark.parametrize(
    ("here", "there"),
    [
        pytest.param("files", ["files", "files"], id="files"),
        pytest.param("cuda:0", ["cuda:0", "cuda:0"], id="same", marks=[pytest.mark.gpu, needs_gpu]),
        pytest.param("cuda:0", ["cuda:0", "cuda:1"], id="two", marks=[pytest.mark.gpu, needs_two]),
    ],
)
def test_every_version_arrives_bit_for_bit_and_a_dead_receiver_is_left_out(
    tmp_path: Path, here: str, there: list[str]
) -> None:
    """Two processes take version after version; one is killed half way, the other goes on."""
    memory = tmp_path / "memory"
    memory.mkdir()
    here, *there = [str(memory) if name == "files" else name for name in (here, *there)]
    with Processes(tmp_path, here, there) as processes:
        pool = processes.publisher._address
        for version in range(VERSIONS):
            if version == VERSIONS // 2:
                processes.processes["rollout-1"].process.kill()
            state = make_state(processes.device.device, seed=version)
            took = processes.publisher.publish(3, version, state.items(), PATIENCE_S)
            assert took == ["rollout-0", "rollout-1"][: 2 if version < VERSIONS // 2 else 1]
            for name in took:
                *arriving, last = processes.processes[name].reports
                assert last == ((3, version), checksum(state))
                assert arriving[-3:] == [(None, "")] * 3, "in between it holds nothing"
        assert processes.publisher._address == pool


# The rules, in one process.


class Pair:
    """A publisher and a receiver that meet through lists."""

    def __init__(self, uuid: str = "GPU-0", **given: Any) -> None:
        self.node = FakeNode()
        self.there = FakeDevice(self.node, uuid)
        self.state = make_state(torch.device("cpu"))
        self.receiver = DeviceReceiver(self.there, self.state)
        self.sent: list[WeightsBucket] = []
        self.on_send: Callable[[WeightsBucket], None] = self.take
        self.here = FakeDevice(self.node, "GPU-0")
        self.publisher = DevicePublisher(
            self.here, self._send, **{"bucket_bytes": BUCKET_BYTES, **given}
        )
        self.publisher.add_receiver("rollout-0")

    def _send(self, name: str, bucket: WeightsBucket) -> None:
        self.sent.append(bucket)
        self.on_send(bucket)

    def take(self, bucket: WeightsBucket) -> None:
        self.receiver.take(bucket)
        self.publisher.taken("rollout-0", bucket.taken())

    def acknowledge(self, bucket: WeightsBucket) -> None:
        self.publisher.taken("rollout-0", bucket.taken())

    def buckets(self, state: dict[str, torch.Tensor] | None = None) -> list[WeightsBucket]:
        """Those of a version that fits the pool, not taken yet."""
        self.on_send, self.sent = self.acknowledge, []
        given = state or make_state(torch.device("cpu"), seed=5)
        self.publisher.publish(0, 0, given.items())
        return self.sent


def test_pieces_fill_buckets_without_overlap() -> None:
    """Aligned, in order; a tensor goes on where the bucket ends; nothing of an empty one."""
    size = 4 * ALIGNMENT_BYTES
    sizes = {"a": 10, "empty": 0, "b": 2 * size + 3, "c": ALIGNMENT_BYTES, "d": 1}
    buckets = cut(sizes, size)
    assert [[tuple(piece) for piece in bucket] for bucket in buckets] == [
        [("a", 0, 0, 10), ("b", 0, 256, 768)],
        [("b", 768, 0, 1024)],
        [("b", 1792, 0, 259), ("c", 0, 512, 256), ("d", 0, 768, 1)],
    ]
    assert cut({}, size) == [[]]


def test_one_pool_serves_all_versions_and_is_mapped_once() -> None:
    """Nothing of the model is exported; what is not contiguous travels too; at the end all is given back."""
    pair = Pair()
    for version in range(5):
        state = make_state(torch.device("cpu"), seed=version)
        sent = {**state, "head": state["head"].t().contiguous().t()}
        assert pair.publisher.publish(0, version, sent.items()) == ["rollout-0"]
        assert pair.receiver.held == (0, version)
        assert checksum(pair.state) == checksum(state)
    assert {bucket.handle for bucket in pair.sent} == {pair.sent[0].handle}
    assert len(pair.there.opened) == len(pair.here.allocated) == 1
    pair.receiver.close()
    pair.publisher.close()
    assert not pair.there.opened
    assert not pair.here.allocated


def test_a_bucket_is_filled_while_the_one_before_is_copied() -> None:
    """Two are out before the first is acknowledged, never three."""
    pair = Pair()
    out: list[WeightsBucket] = []
    most = []

    def hold(bucket: WeightsBucket) -> None:
        out.append(bucket)
        most.append(len(out))
        assert [b.sequence for b in out] == [b.sequence for b in pair.sent[-len(out) :]]
        if len(out) == NUM_BUCKETS or bucket.last:
            while out:
                pair.take(out.pop(0))

    pair.on_send = hold
    for version in range(3):
        state = make_state(torch.device("cpu"), seed=version)
        pair.publisher.publish(0, version, state.items())
        assert checksum(pair.state) == checksum(state)
    assert max(most) == NUM_BUCKETS


def test_a_receiver_that_does_not_acknowledge_is_named_and_its_bucket_stays() -> None:
    """Its bucket is written again only when it is known to have stopped reading."""
    pair = Pair()
    pair.on_send = lambda bucket: None
    state = make_state(torch.device("cpu"), seed=1)
    with pytest.raises(
        ChannelError, match=r"rollout-0 did not take a bucket of weights within 0.0 s"
    ):
        pair.publisher.publish(0, 0, state.items(), timeout_s=0.0)
    assert len(pair.sent) == NUM_BUCKETS
    with pytest.raises(ChannelError, match="rollout-0"):
        pair.publisher.publish(0, 1, state.items(), timeout_s=0.0)
    assert len(pair.sent) == NUM_BUCKETS, "nothing more was written"
    pair.publisher.remove_receiver("rollout-0")
    assert pair.publisher.publish(0, 2, state.items(), timeout_s=0.0) == []
    pair.publisher.taken("rollout-0", WeightsBucketTaken(sequence=0))  # late words of the dead
    pair.publisher.add_receiver("rollout-1")
    pair.on_send = lambda bucket: pair.publisher.taken("rollout-1", bucket.taken())
    assert pair.publisher.publish(0, 3, state.items(), timeout_s=0.0) == ["rollout-1"]


def test_who_joins_in_mid_version_gets_the_next_one() -> None:
    """It would have parts only."""
    pair = Pair()
    joined = []

    def join(bucket: WeightsBucket) -> None:
        pair.take(bucket)
        if not joined:
            pair.publisher.add_receiver("rollout-1")
            joined.append(bucket)

    pair.on_send = join
    state = make_state(torch.device("cpu"), seed=1)
    assert pair.publisher.publish(0, 0, state.items()) == ["rollout-0"]


def test_no_version_is_held_after_a_gap() -> None:
    """A bucket that is missed, or of another version, breaks the version off; the next whole one is taken."""
    pair = Pair()
    buckets = pair.buckets()
    assert len(buckets) > 2
    pair.receiver.take(buckets[0])
    with pytest.raises(WeightsMismatch, match=r"bucket 2 of version \(0, 0\)"):
        pair.receiver.take(buckets[2])
    with pytest.raises(WeightsMismatch, match="where None was expected"):
        pair.receiver.take(buckets[1])
    assert pair.receiver.held is None
    assert pair.receiver.take(pair.buckets()[0]) is False
    pair.on_send = pair.take
    state = make_state(torch.device("cpu"), seed=9)
    pair.publisher.publish(1, 1, state.items())
    assert pair.receiver.held == (1, 1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("norm"), "without all of norm"),
        (lambda state: state.update(more=torch.ones(3)), "more is no tensor of the receiver"),
        (lambda state: state.update(norm=torch.ones(64)), "norm is bfloat16 .* float32"),
        (lambda state: state.update(head=torch.ones(64, 33)), r"head is float32 \[33, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: Callable[[Any], None], says: str) -> None:
    """And the receiver holds no version."""
    pair = Pair(bucket_bytes=1024 * ALIGNMENT_BYTES)
    state = make_state(torch.device("cpu"), seed=1)
    change(state)
    (bucket,) = pair.buckets(state)
    with pytest.raises(WeightsMismatch, match=says):
        pair.receiver.take(bucket)
    assert pair.receiver.held is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offset": -1}, "outside its pool"),
        ({"offset": 2**40}, "outside its pool"),
        ({"start": 2**40}, "outside its pool or tensor"),
        ({"start": -256}, "outside its pool or tensor"),
        ({"size_bytes": -1}, "outside its pool or tensor"),
    ],
)
def test_places_outside_the_memory_are_refused(change: dict[str, int], says: str) -> None:
    """A wrong number from the wire is not an address."""
    pair = Pair()
    bucket = pair.buckets()[0]
    piece = msgspec.structs.replace(bucket.pieces[0], **change)
    with pytest.raises(BadFrame, match=says):
        pair.receiver.take(msgspec.structs.replace(bucket, pieces=(piece,)))
    with pytest.raises(BadFrame, match="its memory has"):
        pair.receiver.take(msgspec.structs.replace(bucket, pool_bytes=bucket.pool_bytes + 1))
    with pytest.raises(BadFrame, match="a handle of 3 bytes"):
        pair.receiver.take(msgspec.structs.replace(bucket, handle=b"abc"))
    assert pair.there.copies == 0


def test_a_gpu_out_of_reach_says_what_to_do() -> None:
    """Two GPUs without peer access: the host copy is the way."""
    pair = Pair(uuid="GPU-1")
    pair.node.apart.add("GPU-0")
    with pytest.raises(DeviceUnreachable, match=r"GPU-0 cannot be mapped for GPU-1.*host copy"):
        pair.receiver.take(pair.buckets()[0])


def test_what_cannot_work_is_refused_at_the_start() -> None:
    """Buckets that would tear elements apart, tensors that bytes cannot be copied into."""
    with pytest.raises(ValueError, match="bucket_bytes = 100 is no multiple of 256"):
        Pair(bucket_bytes=100)
    with pytest.raises(ValueError, match="x is not contiguous"):
        DeviceReceiver(FakeDevice(FakeNode()), {"x": torch.ones(3, 4).t()})


def test_messages_survive_the_wire() -> None:
    """Handles, names and places as plain fields."""
    pair = Pair()
    for bucket in pair.buckets():
        assert decode(encode(bucket)) == bucket
        assert decode(encode(bucket.taken())) == bucket.taken()
