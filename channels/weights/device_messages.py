"""What a trainer and rollout replicas on GPUs of one node say to each other about weights. Torch-free.

rollout                                             every rank of the trainer
   │ ── DeviceWeightsWelcome ─────────────────────────▶ │   "I could take weights on my GPU" (to rank 0)
   │ ◀── WeightsPublished("cuda_ipc"), by the conductor ─ │   from now on, until the next update, it can be had
   │ ── DeviceWeightsAsked(version) ──────────────────▶ │   at the receiver's boundary
   │ ◀──────────────────────────────── WeightsBucket ── │   as often as it takes
   │ ── WeightsBucketTaken ───────────────────────────▶ │
   │ ◀───────────────────────── DeviceWeightsRefused ── │   instead: the host copy is complete, load that
"""

import msgspec

from channels.messages import Message
from channels.weights.shards import Box

CUDA_IPC = "cuda_ipc"  # the variant's name


class DeviceWeightsWelcome(Message, frozen=True, tag="device_weights_welcome"):
    """Rollout to trainer: weights may come from GPU to GPU."""


class DeviceWeightsAsked(Message, frozen=True, tag="device_weights_asked"):
    """Rollout to every rank of the trainer: bring me your part of this version; I write nothing else meanwhile."""

    run_attempt: int
    policy_version: int


class DeviceWeightsRefused(Message, frozen=True, tag="device_weights_refused"):
    """Rank to rollout: the trainer's weights are, or are about to be, others; what there is lies in the host copy."""

    run_attempt: int
    policy_version: int


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Some bytes of a part of a tensor, in a bucket."""

    name: str
    dtype: str  # as in "bfloat16"
    shape: tuple[int, ...]  # of the whole tensor
    box: Box  # of the part, in the whole tensor
    start: int  # in the part, bytes
    offset: int  # in the pool, bytes
    size_bytes: int


class WeightsBucket(Message, frozen=True, tag="weights_bucket"):
    """Publisher to receiver: these bytes of a version can be copied. In order, acknowledged by WeightsBucketTaken."""

    run_attempt: int
    policy_version: int
    rank: int  # of the publisher, of so many
    num_ranks: int
    index: int  # of this publisher's in the version, from 0
    last: bool  # this publisher's part is complete with it
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
