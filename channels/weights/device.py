"""Weights from a trainer's GPU straight into those of rollout replicas on the same node.

    publisher = DevicePublisher(CudaDevice(), send)            # a rank of the trainer
    publisher.publish(run_attempt, version, model_tensors)     # in a thread
    receiver = DeviceReceiver(CudaDevice(), own_tensors)       # a rollout replica
    complete = receiver.take(bucket)                           # in its worker thread; then acknowledge

Contract:
* The publisher has one pool of device memory, made once and used again for every version; no tensor of a model is ever
  exported. Tensors are laid one after the other, in pieces, into the pool's buckets, converted to the dtype that is
  published. While receivers copy one bucket out, the next one is filled.
* Of a trainer of several ranks each has a publisher of its own, for its shards (`channels.weights.sharded`), and a
  receiver puts together what comes from all of them. Nothing is gathered on any rank.
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
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from channels.errors import BadFrame, ChannelError, WeightsMismatch
from channels.tensors.devices import HANDLE_BYTES, Device
from channels.tensors.errors import DeviceError, DeviceUnreachable
from channels.weights.device_messages import Piece, WeightsBucket, WeightsBucketTaken
from channels.weights.sharded import Outline, Parts, outline
from channels.weights.shards import Box, intersect, numel, whole, within
from channels.weights.versions import VersionName

BUCKET_BYTES = 256 * 1024 * 1024
NUM_BUCKETS = 2
ALIGNMENT_BYTES = 256  # of a piece: a multiple of every element size
TIMEOUT_S = 30.0  # for a bucket to be taken


class Cut(NamedTuple):
    """A piece before its bucket has a place."""

    of: Hashable
    start: int
    offset: int  # in the bucket
    size_bytes: int


def cut(sizes: Mapping[Any, int], bucket_bytes: int) -> list[list[Cut]]:
    """Lay parts of so many bytes into buckets, one after the other; one that does not fit goes on in the next."""
    buckets: list[list[Cut]] = [[]]
    offset = 0
    for part, size_bytes in sizes.items():
        start = 0
        while start < size_bytes:
            if offset >= bucket_bytes:
                buckets.append([])
                offset = 0
            taken = min(size_bytes - start, bucket_bytes - offset)
            buckets[-1].append(Cut(part, start, offset, taken))
            start += taken
            offset += -(-taken // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return buckets


class DevicePublisher:
    """The trainer's end; see the module docstring. `publish` blocks; the rest may be called from another thread.

    send: called with a receiver's name in the thread of `publish`    bucket_bytes: the pool has NUM_BUCKETS of them
    dtype: of floating tensors that is published, None for that of each    rank: of the trainer's num_ranks
    """

    def __init__(
        self,
        device: Device,
        send: Callable[[str, WeightsBucket], None],
        bucket_bytes: int = BUCKET_BYTES,
        *,
        dtype: str | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if bucket_bytes <= 0 or bucket_bytes % ALIGNMENT_BYTES:
            raise ValueError(
                f"bucket_bytes = {bucket_bytes} is no multiple of {ALIGNMENT_BYTES}: round it up"
            )
        self._device = device
        self._send = send
        self._dtype = dtype
        self._parts = Parts(rank, num_ranks)
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

    def receivers(self) -> list[str]:
        """Those that were added."""
        with self._changed:
            return list(self._untaken)

    def reading(self) -> list[str]:
        """Those that may be reading a bucket."""
        with self._changed:
            return [name for name, untaken in self._untaken.items() if untaken]

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

        tensors: (name, tensor) pairs on this device, in any layout, or DTensors. Raises ChannelError naming the
        receivers that do not acknowledge a bucket in time.
        """
        given = dict(tensors)
        made = outline(given, self._dtype)
        parts = {
            (name, box): part for name, box, part in self._parts.of(given)
        }  # views: nothing is copied
        sizes = {key: part.numel() * made[key[0]].dtype.itemsize for key, part in parts.items()}
        buckets = cut(sizes, self._bucket_bytes)
        receivers = self.receivers()
        for index, cuts in enumerate(buckets):
            # Both counts go on from version to version, so a place is never written while it may be read.
            self._wait_taken(self._sequence - NUM_BUCKETS, timeout_s)
            base = self._sequence % NUM_BUCKETS * self._bucket_bytes
            self._gather(cuts, parts, made, base)
            bucket = WeightsBucket(
                run_attempt=run_attempt,
                policy_version=version,
                rank=self._parts.rank,
                num_ranks=self._parts.num_ranks,
                index=index,
                last=index == len(buckets) - 1,
                sequence=self._sequence,
                device_uuid=self._device.uuid,
                handle=self._handle,
                pool_bytes=self._pool_bytes,
                pieces=tuple(_piece(one, made, base) for one in cuts),
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

    def _gather(
        self,
        cuts: list[Cut],
        parts: Mapping[Any, Tensor],
        made: Mapping[str, Outline],
        base: int,
    ) -> None:
        """Fill a bucket, and see that it is written: a handle says nothing about the stream behind it."""
        for piece in cuts:
            name, _ = key = cast(tuple[str, Box], piece.of)
            dtype = made[name].dtype
            first = base + piece.offset
            place = self._pool[first : first + piece.size_bytes].view(dtype)
            # Pieces begin and end at whole elements: places are aligned for every dtype.
            begin = piece.start // dtype.itemsize
            place.copy_(parts[key].reshape(-1)[begin : begin + place.numel()])
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
        self._version: VersionName | None = None  # that arrives
        self._next: dict[
            int, int | None
        ] = {}  # by rank: the bucket that comes next, None after the last
        self._staged: dict[tuple[str, Box], Tensor] = {}  # parts that do not lie in one piece here
        self._missing: dict[str, int] = {}  # bytes, of the version that arrives
        self.held: VersionName | None = None

    def take(self, bucket: WeightsBucket) -> bool:
        """Copy a bucket into the tensors, and wait until it is there. Returns whether its version is complete.

        Raises WeightsMismatch for tensors or an order that do not fit, BadFrame for bytes outside the pool,
        DeviceUnreachable when the other GPU's memory cannot be mapped. After any of these the bucket is to be
        acknowledged all the same, and the host copy to be loaded.
        """
        version = (bucket.run_attempt, bucket.policy_version)
        self.held = None
        if version != self._version or self._next.get(bucket.rank) is None:
            self._begin(version, bucket)
        expected = self._next.get(bucket.rank)
        if bucket.index != expected:
            self._version = None
            raise WeightsMismatch(
                f"bucket {bucket.index} of version {version} came where {expected} was expected"
            )
        try:
            self._copy(bucket)
        except BaseException:
            self._version = None
            raise
        self._next[bucket.rank] = None if bucket.last else bucket.index + 1
        if any(following is not None for following in self._next.values()):
            return False
        self._version = None
        lacking = [name for name, size_bytes in self._missing.items() if size_bytes]
        if lacking:
            raise WeightsMismatch(
                f"version {version} came without all of {', '.join(lacking[:3])}"
                f"{f' and {len(lacking) - 3} more' if len(lacking) > 3 else ''}"
            )
        self.held = version
        return True

    def _begin(self, version: VersionName, bucket: WeightsBucket) -> None:
        """The first bucket of a version is here, of whichever rank."""
        if bucket.index:
            self._version, self._next = None, {}
            return
        self._version = version
        self._next = dict.fromkeys(range(bucket.num_ranks), 0)
        self._staged = {}
        self._missing = {name: raw.numel() for name, raw in self._flat.items()}

    def _copy(self, bucket: WeightsBucket) -> None:
        address = self._map(bucket)
        for piece in bucket.pieces:
            self._check(piece, bucket.pool_bytes)
        try:
            for piece in bucket.pieces:
                raw = self._place(piece)[piece.start : piece.start + piece.size_bytes]
                self._device.copy(raw, address + piece.offset)
                self._missing[piece.name] -= piece.size_bytes
                staged = self._staged.get((piece.name, piece.box))
                if staged is not None and piece.start + piece.size_bytes == staged.nbytes:
                    tensor = self._tensors[piece.name]
                    there = tensor[within(piece.box, whole(tensor.shape))]
                    there.copy_(staged.view(tensor.dtype).view(there.shape))
                    del self._staged[piece.name, piece.box]
        finally:
            _finish(self._device)  # nothing reads the bucket when it is acknowledged

    def _place(self, piece: Piece) -> Tensor:
        """Where the part lies, flat: in its tensor, or for a while beside it."""
        tensor = self._tensors[piece.name]
        there = tensor[within(piece.box, whole(tensor.shape))]
        if there.is_contiguous():
            return there.detach().view(-1).view(torch.uint8)
        return self._staged.setdefault(
            (piece.name, piece.box),
            torch.empty(there.nbytes, dtype=torch.uint8, device=tensor.device),
        )

    def close(self) -> None:
        """Close the mappings of all pools, as when a publisher has ended. New buckets map theirs again."""
        self._version = None
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
        all_of_it = whole(tensor.shape)
        is_part = len(piece.box) == len(all_of_it) and intersect(piece.box, all_of_it) == piece.box
        part_bytes = numel(piece.box) * tensor.element_size() if is_part else 0
        in_part = 0 <= piece.start <= piece.start + piece.size_bytes <= part_bytes
        if not in_pool or not in_part:
            raise BadFrame(f"a piece of {piece.name} lies outside its pool or tensor: {piece}")


def _piece(one: Cut, made: Mapping[str, Outline], base: int) -> Piece:
    name, box = cast(tuple[str, Box], one.of)
    return Piece(
        name=name,
        dtype=_name_of(made[name].dtype),
        shape=made[name].shape,
        box=box,
        start=one.start,
        offset=base + one.offset,
        size_bytes=one.size_bytes,
    )


def _finish(device: Device) -> None:
    """Wait for what was given to this thread's stream."""
    event = device.event()
    event.record(device.stream())
    event.synchronize()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
