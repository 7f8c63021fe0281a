"""A node's host copy from another node: the side that gets the versions.

    fetcher = WeightsFetcher(endpoint, "job/trainer-0", directory)
    fetcher.received(sender, message, payload)     # each ForFetcher message of the endpoint
    published = await fetcher.fetch()              # when the server's node has published

`fetch` brings the newest version of the server into this node's directory, where any process of the node has it as if
it had been published here, and says what to tell them; None when it is there already. Any process of the node may call
it, also several at a time: whoever holds the directory's lock fetches, the others find the version there. So a version
crosses the node's link once; one that was missed is never asked for.

What crosses is the least that leads there: the delta, where this node has its base; an adapter alone, where it has the
base; of every tensor the part that this node's receivers need, where `parts` says so (ranks of a tensor-parallel
replica that spans nodes). The host copy has just these parts then. While a bucket is copied to its place the next one
arrives.

When a version is to be fetched is for others to say: whoever introduces two nodes connects both endpoints, and calls
`fetch` at each `WeightsPublished` of the other node and once at the start.
"""

import asyncio
import fcntl
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from channels.endpoint import Endpoint
from channels.errors import BadFrame, PeerLost, VersionGone, WeightsMismatch
from channels.weights.delta import WeightsDelta
from channels.weights.directory import Publication, WeightsDirectory, WeightsPublished
from channels.weights.exchange import (
    TIMEOUT_S,
    ForFetcher,
    ForServer,
    WeightsAsked,
    WeightsBytes,
    WeightsBytesTaken,
    WeightsFile,
    WeightsFileAsked,
    WeightsNewest,
    WeightsNotThere,
)
from channels.weights.layout import Layout, read_layout
from channels.weights.sharded import Outline
from channels.weights.shards import Box
from channels.weights.threads import in_thread
from channels.weights.versions import VersionName

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ATTEMPTS = 5  # a version may be replaced between asking for its name and for its file
LOCK = ".fetching"  # in the directory
Answer = TypeVar("Answer", bound=ForFetcher)


class WeightsFetcher:
    """See the module docstring. On the loop; what blocks goes to threads.

    server: the peer that serves    parts: of each tensor, what this node needs; None is all of every tensor
    """

    def __init__(
        self,
        endpoint: Endpoint,
        server: str,
        directory: WeightsDirectory,
        *,
        parts: Mapping[str, Box] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._endpoint = endpoint
        self._server = server
        self._directory = directory
        self._parts = None if parts is None else dict(parts)
        self._timeout_s = timeout_s
        self._request = 0
        self._answers: asyncio.Queue[tuple[ForFetcher, Any] | None] = asyncio.Queue()
        self._one_at_a_time = asyncio.Lock()

    def received(self, sender: str, message: ForFetcher, payload: Any) -> None:
        """Take what the server said."""
        if sender == self._server:
            self._answers.put_nowait((message, payload))

    def peer_gone(self, peer: str) -> None:
        """The server died: whoever fetches is told."""
        if peer == self._server:
            self._answers.put_nowait(None)

    async def fetch(self) -> WeightsPublished | None:
        """Bring the newest version here, see the module docstring.

        Raises PeerLost when the server dies, TimeoutError when it says nothing for `timeout_s`, ChannelError without
        room here.
        """
        async with self._one_at_a_time, _locked(self._directory.paths[0]):
            while not self._answers.empty():
                self._answers.get_nowait()  # to whoever gave up, or from a server that died since
            for _ in range(ATTEMPTS):
                try:
                    return await self._fetch()
                except VersionGone as error:
                    log.info("weights were replaced while they were asked for: %s", error)
            raise VersionGone(
                f"{self._server} replaced its weights {ATTEMPTS} times while they were asked for: "
                "let it keep more versions"
            )

    async def _fetch(self) -> WeightsPublished | None:
        here = self._directory.newest()
        base_here = self._directory.newest(full=True)
        # A delta is one of whole tensors.
        whole = base_here is not None and self._parts is None
        held = base_here.version if whole and base_here is not None else None
        newest = await self._ask(WeightsAsked(request=self._next(), held=held), WeightsNewest)
        if newest.version is None or (here is not None and here.version >= newest.version):
            return None
        if newest.variant == "delta" and held is not None:
            try:
                return await self._fetch_delta(newest.version, held)
            except WeightsMismatch as error:
                log.warning("all of version=%s is fetched: %s", newest.version, error)
                return await self._fetch_file(newest.version)
        if newest.variant == "adapter" and newest.base is not None:
            if base_here is None or base_here.version != newest.base:
                await self._fetch_file(newest.base)
            return await self._fetch_file(newest.version, base=newest.base)
        return await self._fetch_file(newest.version)

    async def _fetch_file(
        self, version: VersionName, *, base: VersionName | None = None
    ) -> WeightsPublished:
        # Parts are those of the model: an adapter is small, and goes to every rank.
        parts = self._parts if base is None else None
        asked = WeightsFileAsked(request=self._next(), version=version, parts=parts)
        layout = await self._file(asked)
        begun = await in_thread(
            partial(self._directory.begin, *version, _outline(layout), base=base),
            undo=Publication.drop,
        )
        with begun as publication:
            if publication.layout.header != layout.header:
                raise BadFrame(
                    f"{self._server} lays version {version} out in another way: "
                    "run one flowd version on all nodes"
                )
            await self._data(asked, (publication.tensors[name] for name in layout.places))
            return await in_thread(publication.finish)

    async def _fetch_delta(self, version: VersionName, held: VersionName) -> WeightsPublished:
        """Make the version of the one that is here, and keep the delta for the receivers of this node."""
        import torch

        asked = WeightsFileAsked(request=self._next(), version=version, held=held)
        layout = await self._file(asked)
        changes = {
            name: torch.empty(place.shape, dtype=place.dtype)
            for name, place in layout.places.items()
        }
        await self._data(asked, iter(changes.values()))
        delta = WeightsDelta.of_tensors(changes, layout.metadata.get("checksum", ""))
        return await in_thread(self._apply, version, held, delta)

    def _apply(
        self, version: VersionName, held: VersionName, delta: WeightsDelta
    ) -> WeightsPublished:
        directory = self._directory
        with directory.lend(held) as base:
            with directory.begin(*version, _outline(base.layout)) as publication:
                for name, tensor in base.tensors.items():
                    publication.write(name, tensor)
                delta.apply(publication.tensors)  # compares the checksum of the whole state
                return publication.finish((held, delta))

    # The conversation.

    async def _file(self, asked: WeightsFileAsked) -> Layout:
        answer = await self._ask(asked, WeightsFile)
        return read_layout(memoryview(answer.header), self._server, answer.size_bytes)

    async def _data(self, asked: WeightsFileAsked, tensors: "Iterator[torch.Tensor]") -> None:
        """Fill tensors with what follows, in order."""
        filler = _Filler(tensors)
        index, last = 0, False
        while not last:
            message, arrays = await self._answer(WeightsBytes)
            if message.index != index:
                raise BadFrame(f"bucket {message.index} of weights came where {index} was expected")
            await in_thread(filler.take, arrays)
            self._say(WeightsBytesTaken(request=asked.request, index=index))
            index, last = index + 1, message.last
        filler.check_full()

    async def _ask(self, message: ForServer, kind: type[Answer]) -> Answer:
        self._say(message)
        return (await self._answer(kind))[0]

    async def _answer(self, kind: type[Answer]) -> tuple[Answer, Any]:
        """The next answer to the request that runs; what comes of earlier ones is dropped."""
        async with asyncio.timeout(self._timeout_s):
            while True:
                came = await self._answers.get()
                if came is None:
                    raise PeerLost(f"{self._server} was lost while weights were fetched from it")
                message, payload = came
                if message.request != self._request:
                    continue
                if isinstance(message, WeightsNotThere):
                    raise VersionGone(message.reason)
                if not isinstance(message, kind):
                    raise BadFrame(f"{type(message).__name__} came for a {kind.__name__}")
                return message, payload

    def _say(self, message: ForServer) -> None:
        self._endpoint.send(self._server, message)

    def _next(self) -> int:
        self._request += 1
        return self._request


class _Filler:
    """Writes the bytes of consecutive arrays into consecutive tensors."""

    def __init__(self, tensors: "Iterator[torch.Tensor]") -> None:
        self._tensors = tensors
        self._target: torch.Tensor | None = None  # what of the current one is not filled
        self._next()

    def take(self, arrays: list[Any]) -> None:
        """Raises BadFrame for more bytes than there is room for."""
        import torch

        for array in arrays:
            left = torch.from_numpy(array)
            while left.numel():
                if self._target is None:
                    raise BadFrame("more bytes of weights came than were announced")
                count = min(left.numel(), self._target.numel())
                self._target[:count].copy_(left[:count])
                left, self._target = left[count:], self._target[count:]
                if not self._target.numel():
                    self._next()

    def check_full(self) -> None:
        """Raises BadFrame unless every tensor is filled."""
        if self._target is not None:
            raise BadFrame("fewer bytes of weights came than were announced")

    def _next(self) -> None:
        import torch

        self._target = None
        for tensor in self._tensors:
            if tensor.numel():
                self._target = tensor.view(-1).view(torch.uint8)
                return


def _outline(layout: Layout) -> dict[str, Outline]:
    return {name: Outline(place.dtype, tuple(place.shape)) for name, place in layout.places.items()}


@asynccontextmanager
async def _locked(directory: Path) -> AsyncIterator[None]:
    """One process of the node at a time. The lock is the operating system's: who dies holds nothing."""

    def take() -> BinaryIO:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open("wb", buffering=0)
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    file = await in_thread(take, undo=lambda file: file.close())
    try:
        yield
    finally:
        file.close()
