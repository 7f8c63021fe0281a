"""What nodes say to each other about weights: a fetcher asks, a server answers with buckets of bytes.

    fetcher                                                server
       │ ── WeightsAsked(held) ────────────────────────────▶ │   "what is the newest, and how do I get there?"
       │ ◀──────────────── WeightsNewest(version, variant) ── │
       │ ── WeightsFileAsked(version, held, parts) ────────▶ │   "that file, or these parts of its tensors"
       │ ◀─────────────────────────── WeightsFile(header) ── │   held against re-use from now on
       │ ◀──────────────────── WeightsBytes(index) + data ── │   NUM_BUCKETS in flight at most
       │ ── WeightsBytesTaken(index) ──────────────────────▶ │
       │ ◀──────────────────────────── WeightsNotThere ───── │   instead of any answer: ask again

They have a lane of their own among the messages of an endpoint: the data of a version follows in chunks on the second
connection (channels.tensors.tcp), and what is said about anything else passes it by.
"""

from typing import ClassVar

from channels.messages import Message
from channels.weights.shards import Box
from channels.weights.versions import VersionName

LANE = "weights"
BUCKET_BYTES = 16 * 1024 * 1024
NUM_BUCKETS = 2  # one is copied to its place while the next one arrives
TIMEOUT_S = 60.0  # for the next bucket, or its acknowledgement


class ForServer(Message, frozen=True):
    """From a fetcher. request: counts those of this fetcher"""

    channel: ClassVar[str] = LANE
    request: int


class ForFetcher(Message, frozen=True):
    """From a server: the answer to a request."""

    channel: ClassVar[str] = LANE
    request: int


class WeightsAsked(ForServer, frozen=True, tag="weights_asked"):
    """What is the newest version? held: the newest full one that the fetcher has, which a delta may start from"""

    held: VersionName | None


class WeightsNewest(ForFetcher, frozen=True, tag="weights_newest"):
    """This is; None before the first. variant: of the file to ask for, "delta" only if it starts from what is held"""

    version: VersionName | None
    variant: str = "full"
    base: VersionName | None = None


class WeightsFileAsked(ForServer, frozen=True, tag="weights_file_asked"):
    """Send the file of a version, or with `held` of the delta from there. parts: of each tensor; None is all"""

    version: VersionName
    held: VersionName | None = None
    parts: dict[str, Box] | None = None


class WeightsFile(ForFetcher, frozen=True, tag="weights_file"):
    """It begins. header: that of a safetensors file with what was asked for; its data follows, in its order"""

    header: bytes
    size_bytes: int  # with the data


class WeightsBytes(ForFetcher, frozen=True, tag="weights_bytes"):
    """The payload is a list of arrays of bytes: the next ones of the data. last: the file is complete with it"""

    index: int
    last: bool


class WeightsBytesTaken(ForServer, frozen=True, tag="weights_bytes_taken"):
    """A bucket is where it belongs: one more may be sent."""

    index: int


class WeightsNotThere(ForFetcher, frozen=True, tag="weights_not_there"):
    """What was asked for is gone, or never was; says why."""

    reason: str
