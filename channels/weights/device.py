"""Weights from a trainer's GPU straight into those of rollout replicas on the same node.

    publisher = DevicePublisher(CudaDevice(), send)            # the trainer
    publisher.publish(run_attempt, version, model_tensors)     # in its worker thread
    receiver = DeviceReceiver(CudaDevice(), own_tensors)       # a rollout replica
    complete = receiver.take(bucket)                           # in its worker thread; then acknowledge

Contract:
* The publisher has one pool of device memory, made once and used again for every version; no tensor of a model is ever
  exported. Tensors are laid one after the other, in pieces, into the pool's buckets. While receivers copy one bucket
  out, the next one is filled.
* A bucket says where it lies (handle, UUID of the GPU, bytes) and what is in it. It has been written completely when it
  is sent. Receivers copy from it into tensors of their own, on the same GPU or from another one over NVLink or PCIe,
  and acknowledge when the copy is done; only then is it written again.
* Tensors arrive in place. From the first bucket of a version to the last, a receiver holds no version at all: it swaps
  between two forward passes. If the publisher dies in between, the receiver loads the node's host copy
  (`WeightsDirectory`), as does one that joins late or missed something.
* A receiver is left out once its process has ended (`remove_receiver`); one that lives and does not acknowledge makes
  `publish` fail and name it, for nobody else can know that it has stopped reading.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from channels.errors import BadFrame, ChannelError, WeightsMismatch
from channels.messages import Message
from channels.tensors.devices import HANDLE_BYTES, Device
from channels.tensors.errors import DeviceError, DeviceUnreachable
from channels.weights.versions import VersionName

BUCKET_BYTES = 256 * 1024 * 1024
NUM_BUCKETS = 2
ALIGNMENT_BYTES = 256  # of a piece: a multiple of every element size
TIMEOUT_S = 30.0  # for a bucket to be taken


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Some bytes of a tensor, in a bucket."""

    name: str
    dtype: str  # as in "bfloat16"
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # in the tensor, bytes
    offset: int  # in the pool, bytes
    size_bytes: int


class WeightsBucket(Message, frozen=True, tag="weights_bucket"):
    """Publisher to receiver: these bytes of a version can be copied. In order, acknowledged by WeightsBucketTaken."""

    run_attempt: int
    policy_version: int
    index: int  # in the version, from 0
    last: bool  # the version is complete with it
    sequence: int  # of all that the publisher sends
    device_uuid: str
    handle: bytes  # of the pool
    pool_bytes: int
    pieces: tuple[Piece, ...]

    def taken(self) -> "WeightsBucketTaken":
        """The acknowledgement: this receiver will not read the bucket any more."""
        return WeightsBucketTaken(sequence=self.sequence)


class WeightsBucketTaken(Message, frozen=True, tag="weights_bucket_taken"):
    """Receiver to publisher: a bucket may be written again, as far as it is concerned."""

    sequence: int


class Cut(NamedTuple):
    """A piece before its bucket has a place."""

    name: str
    start: int
    offset: int  # in the bucket
    size_bytes: int


def cut(sizes: Mapping[str, int], bucket_bytes: int) -> list[list[Cut]]:
    """Lay tensors of so many bytes into buckets, one after the other; one that does not fit goes on in the next."""
    buckets: list[list[Cut]] = [[]]
    offset = 0
    for name, size_bytes in sizes.items():
        start = 0
        while start < size_bytes:
            if offset >= bucket_bytes:
                buckets.append([])
                offset = 0
            taken = min(size_bytes - start, bucket_bytes - offset)
            buckets[-1].append(Cut(name, start, offset, taken))
            start += taken
            offset += -(-taken // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return buckets


class DevicePublisher:
    """The trainer's end; see the module docstring. `publish` blocks; the rest may be called from another thread.

    send: called with a receiver's name in the thread of `publish`    bucket_bytes: the pool has NUM_BUCKETS of them
    """

    def __init__(
        self,
        device: Device,
        send: Callable[[str, WeightsBucket], None],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        if bucket_bytes <= 0 or bucket_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"bucket_bytes = {bucket_bytes} is no multiple of {ALIGNMENT_BYTES}: round it up"
            )
        self._device = device
        self._send = send
        self._bucket_bytes = bucket_bytes
        self._pool_bytes = NUM_BUCKETS * bucket_bytes
        self._address = device.allocate(self._pool_bytes)
        self._handle = device.export(self._address)
        self._pool = device.view(self._address, self._pool_bytes, lambda: None)
        self._sequence = 0  # of the next bucket
        self._untaken: dict[str, set[int]] = {}  # by receiver: buckets that it may be reading
        self._changed = threading.Condition()

    def add_receiver(self, name: str) -> None:
        """Send to it, from the next version on. The name is of one process: another has another."""
        with self._changed:
            self._untaken[name] = set()

    def remove_receiver(self, name: str) -> None:
        """Its process has ended: nothing is waited for any more."""
        with self._changed:
            self._untaken.pop(name, None)
            self._changed.notify_all()

    def taken(self, name: str, message: WeightsBucketTaken) -> None:
        """A receiver acknowledged."""
        with self._changed:
            self._untaken.get(name, set()).discard(message.sequence)
            self._changed.notify_all()

    def publish(
        self,
        run_attempt: int,
        version: int,
        tensors: Iterable[tuple[str, Tensor]],
        timeout_s: float = TIMEOUT_S,
    ) -> list[str]:
        """Bring a version to all receivers; returns the names of those that have it now.

        tensors: (name, tensor) pairs on this device, in any layout. Raises ChannelError naming the receivers that do
        not acknowledge a bucket in time.
        """
        given = {name: tensor.detach().contiguous() for name, tensor in tensors}
        flat = {name: tensor.view(-1).view(torch.uint8) for name, tensor in given.items()}
        buckets = cut({name: raw.numel() for name, raw in flat.items()}, self._bucket_bytes)
        with self._changed:
            receivers = list(self._untaken)
        for index, cuts in enumerate(buckets):
            # Both counts go on from version to version, so a place is never written while it may be read.
            self._wait_taken(self._sequence - NUM_BUCKETS, timeout_s)
            base = self._sequence % NUM_BUCKETS * self._bucket_bytes
            self._gather(cuts, flat, base)
            bucket = WeightsBucket(
                run_attempt=run_attempt,
                policy_version=version,
                index=index,
                last=index == len(buckets) - 1,
                sequence=self._sequence,
                device_uuid=self._device.uuid,
                handle=self._handle,
                pool_bytes=self._pool_bytes,
                pieces=tuple(
                    Piece(
                        name=piece.name,
                        dtype=_name_of(given[piece.name].dtype),
                        shape=tuple(given[piece.name].shape),
                        start=piece.start,
                        offset=base + piece.offset,
                        size_bytes=piece.size_bytes,
                    )
                    for piece in cuts
                ),
            )
            self._sequence += 1
            with self._changed:
                receivers = [receiver for receiver in receivers if receiver in self._untaken]
                for receiver in receivers:
                    self._untaken[receiver].add(bucket.sequence)
            for receiver in receivers:
                self._send(receiver, bucket)
        self._wait_taken(self._sequence - 1, timeout_s)
        with self._changed:
            return [receiver for receiver in receivers if receiver in self._untaken]

    def close(self) -> None:
        """Free the pool. Receivers have closed their mappings of it, or ended."""
        del self._pool
        self._device.free(self._address)

    def _gather(self, cuts: list[Cut], flat: Mapping[str, Tensor], base: int) -> None:
        """Fill a bucket, and see that it is written: a handle says nothing about the stream behind it."""
        for piece in cuts:
            place = self._pool[base + piece.offset : base + piece.offset + piece.size_bytes]
            place.copy_(flat[piece.name][piece.start : piece.start + piece.size_bytes])
        _finish(self._device)

    def _wait_taken(self, sequence: int, timeout_s: float) -> None:
        def late() -> list[str]:
            return [
                n for n, untaken in self._untaken.items() if untaken and min(untaken) <= sequence
            ]

        with self._changed:
            if not self._changed.wait_for(lambda: not late(), timeout_s):
                raise ChannelError(
                    f"{', '.join(late())} did not take a bucket of weights within {timeout_s} s: "
                    "stop it, then publish again"
                )


class DeviceReceiver:
    """A rollout replica's end; see the module docstring. Not thread-safe.

    tensors: that versions are copied into, by name; contiguous, on the device
    held: the version that they are, None while one arrives or after something went wrong
    """

    def __init__(self, device: Device, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():
                raise ValueError(f"{name} is not contiguous, so bytes cannot be copied into it")
        self._device = device
        self._tensors = dict(tensors)
        self._flat = {
            name: tensor.detach().view(-1).view(torch.uint8) for name, tensor in tensors.items()
        }
        self._pools: dict[bytes, tuple[int, int]] = {}  # by handle: address here, and size
        self._arriving: tuple[VersionName, int] | None = None  # and the index that comes next
        self._missing: dict[str, int] = {}  # bytes, of the version that arrives
        self.held: VersionName | None = None

    def take(self, bucket: WeightsBucket) -> bool:
        """Copy a bucket into the tensors, and wait until it is there. Returns whether its version is complete.

        Raises WeightsMismatch for tensors or an order that do not fit, BadFrame for bytes outside the pool,
        DeviceUnreachable when the other GPU's memory cannot be mapped. After any of these the bucket is to be
        acknowledged all the same, and the host copy to be loaded.
        """
        version = (bucket.run_attempt, bucket.policy_version)
        expected, self._arriving, self.held = self._arriving, None, None
        if bucket.index == 0:
            self._missing = {name: raw.numel() for name, raw in self._flat.items()}
        elif expected != (version, bucket.index):
            raise WeightsMismatch(
                f"bucket {bucket.index} of version {version} came where {expected} was expected"
            )
        address = self._map(bucket)
        for piece in bucket.pieces:
            self._check(piece, bucket.pool_bytes)
        try:
            for piece in bucket.pieces:
                end = piece.start + piece.size_bytes
                target = self._flat[piece.name][piece.start : end]
                self._device.copy(target, address + piece.offset)
                self._missing[piece.name] -= piece.size_bytes
        finally:
            _finish(self._device)  # nothing reads the bucket when it is acknowledged
        if not bucket.last:
            self._arriving = (version, bucket.index + 1)
            return False
        lacking = [name for name, size_bytes in self._missing.items() if size_bytes]
        if lacking:
            raise WeightsMismatch(
                f"version {version} came without all of {', '.join(lacking[:3])}"
                f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}"
            )
        self.held = version
        return True

    def close(self) -> None:
        """Close the mappings of all pools, as when a publisher has ended. New buckets map theirs again."""
        self._arriving = None
        pools, self._pools = self._pools, {}
        for address, _ in pools.values():
            self._device.close(address)

    def _map(self, bucket: WeightsBucket) -> int:
        """The address of the bucket's pool; opened once, as a process may map a handle only once."""
        if len(bucket.handle) != HANDLE_BYTES:
            raise BadFrame(f"a handle of {len(bucket.handle)} bytes, not {HANDLE_BYTES}")
        if bucket.handle not in self._pools:
            try:
                self._pools[bucket.handle] = self._device.open(bucket.handle)
            except DeviceError as error:
                raise DeviceUnreachable(
                    f"weights on {bucket.device_uuid} cannot be mapped for {self._device.uuid}: {error}; "
                    "load the node's host copy instead"
                ) from error
        address, size_bytes = self._pools[bucket.handle]
        if bucket.pool_bytes > size_bytes:
            raise BadFrame(f"a pool of {bucket.pool_bytes} bytes, but its memory has {size_bytes}")
        return address

    def _check(self, piece: Piece, pool_bytes: int) -> None:
        tensor = self._tensors.get(piece.name)
        if tensor is None:
            raise WeightsMismatch(f"{piece.name} is no tensor of the receiver")
        mine = _name_of(tensor.dtype), tuple(tensor.shape)
        if mine != (piece.dtype, piece.shape):
            raise WeightsMismatch(
                f"{piece.name} is {mine[0]} {list(mine[1])} here, {piece.dtype} {list(piece.shape)} at the "
                "publisher: let it publish what the receiver computes in"
            )
        in_pool = 0 <= piece.offset <= piece.offset + piece.size_bytes <= pool_bytes
        in_tensor = 0 <= piece.start <= piece.start + piece.size_bytes <= tensor.nbytes
        if not in_pool or not in_tensor:
            raise BadFrame(f"a piece of {piece.name} lies outside its pool or tensor: {piece}")


def _finish(device: Device) -> None:
    """Wait for what was given to this thread's stream."""
    event = device.event()
    event.record(device.stream())
    event.synchronize()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
