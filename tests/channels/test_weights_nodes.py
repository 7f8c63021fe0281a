"""Weights between nodes: two processes, two directories, two addresses of the loopback range."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from channel_peers import Run
from forked import PIPE, Forked
from weights_publisher import KEEP, adapter, first_state, update

from channels.errors import BadFrame, PeerLost, VersionGone
from channels.inline import InlineHub
from channels.messages import Message, decode, encode
from channels.socket_endpoint import SocketEndpoint
from channels.weights import WeightsDirectory, WeightsPublished
from channels.weights import exchange as exchange_module
from channels.weights import serving as serving_module
from channels.weights.delta import WeightsDelta, checksum
from channels.weights.exchange import (
    ForFetcher,
    ForServer,
    WeightsBytes,
    WeightsFileAsked,
    WeightsNewest,
)
from channels.weights.fetching import WeightsFetcher
from channels.weights.files import Mappings
from channels.weights.serving import WeightsServer
from channels.weights.shards import Box, whole, within


class OtherNode:
    """The process of weights_server_peer.py."""

    def __init__(self, directory: Path, variant: str, fetcher: str) -> None:
        program = Path(__file__).with_name("weights_server_peer.py")
        words = (str(directory), variant, fetcher)
        self.process = Forked(program, *words, stdin=PIPE, stdout=PIPE)
        self.address: str = self._line()
        self.bytes_sent = 0

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def publish(self, version: int, base: int | None = None) -> tuple[str, int]:
        """The variant, and the bytes that were sent since the last call."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([version, base]) + "\n")
        self.process.stdin.flush()
        variant, total = self._line()
        sent, self.bytes_sent = total - self.bytes_sent, total
        return variant, sent


class Node:
    """This node: an endpoint, a directory, and a fetcher for it."""

    def __init__(self, directory: Path, name: str = "fetcher", **given: Any) -> None:
        self.endpoint = SocketEndpoint(name, "tcp://127.0.0.2:*")
        self.weights = WeightsDirectory(directory, keep=KEEP)
        self.fetcher = WeightsFetcher(self.endpoint, "trainer", self.weights, **given)
        self.endpoint.on_message = self._received

    def _received(self, sender: str, message: Message, payload: Any) -> None:
        assert isinstance(message, ForFetcher)
        self.fetcher.received(sender, message, payload)


@contextmanager
def other_node(directory: Path, variant: str, node: Node) -> Iterator[OtherNode]:
    other = OtherNode(directory, variant, node.endpoint.address)
    try:
        node.endpoint.connect("trainer", other.address)
        yield other
    finally:
        other.process.kill()
        other.process.communicate()
        node.endpoint.close()


def state_at(version: int) -> dict[str, torch.Tensor]:
    state = first_state()
    for number in range(1, version + 1):
        update(state, number)
    return state


def size_of(state: Any) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def test_a_version_crosses_once_as_the_least_that_leads_there(run: Run, tmp_path: Path) -> None:
    """All of it at first, then deltas, all again after a gap; receivers of this node have the delta too."""

    async def main() -> None:
        node = Node(tmp_path / "here")
        with other_node(tmp_path / "there", "delta", node) as other:
            assert await node.fetcher.fetch() is None, "nothing is published yet"
            full = size_of(first_state())
            assert other.publish(0) == ("full", 0)
            twice = await asyncio.gather(node.fetcher.fetch(), node.fetcher.fetch())
            assert sorted(found is None for found in twice) == [False, True]
            variant, sent = other.publish(1)
            assert sent == full, "once, for both"
            published = await node.fetcher.fetch()
            assert published is not None
            assert (published.variant, published.version) == (variant, (0, 1))
            with node.weights.borrow(0, 1, (0, 0)) as found:
                assert isinstance(found, WeightsDelta)
            assert checksum(node.weights.load(0, 1)) == checksum(state_at(1))
            assert other.publish(2)[1] < full
            assert other.publish(3)[1] == 0
            published = await node.fetcher.fetch()
            assert published is not None
            assert (published.variant, published.version) == ("full", (0, 3))
            with pytest.raises(VersionGone):
                node.weights.load(0, 2)
            assert checksum(node.weights.load(0, 3)) == checksum(state_at(3))
            assert await node.fetcher.fetch() is None

    run(main)


def test_a_late_node_gets_the_newest_adapter_and_its_base(run: Run, tmp_path: Path) -> None:
    """Afterwards adapters alone cross the link."""

    async def main() -> None:
        node = Node(tmp_path / "here")
        with other_node(tmp_path / "there", "full", node) as other:
            other.publish(0)
            for version in (1, 2):
                other.publish(version, base=0)
            published = await node.fetcher.fetch()
            assert published is not None
            assert (published.variant, published.base) == ("adapter", (0, 0))
            assert checksum(node.weights.load(0, 0)) == checksum(first_state())
            assert checksum(node.weights.load(0, 2)) == checksum(adapter(2))
            assert other.publish(3, base=0)[1] == size_of(first_state()) + size_of(adapter(2))
            await node.fetcher.fetch()
            assert checksum(node.weights.load(0, 3)) == checksum(adapter(3))
            assert other.publish(4, base=0)[1] == size_of(adapter(3))

    run(main)


def test_a_server_that_dies_is_an_error_and_the_next_one_is_asked_anew(
    run: Run, tmp_path: Path
) -> None:
    """Nothing of the version is to be seen, and nothing of it is left."""

    async def main() -> None:
        node = Node(tmp_path / "here")
        with other_node(tmp_path / "there", "full", node) as other:
            other.publish(0)
            node.fetcher._answers = Losing(node.fetcher)  # type: ignore[assignment]
            with pytest.raises(PeerLost, match="trainer was lost while weights were fetched"):
                await node.fetcher.fetch()
            assert node.weights.newest() is None
            assert not list((tmp_path / "here").glob("*.partial"))
            node.fetcher._answers = asyncio.Queue()
            assert await node.fetcher.fetch() is not None

    run(main)


def inode_of(published: WeightsPublished) -> int:
    return Path(published.path).stat().st_ino


def damage(published: WeightsPublished) -> None:
    """Change one bit of its data."""
    with Path(published.path).open("r+b") as file:
        Mappings(writable=True).get(file, published.size_bytes)[-9] ^= 1


class Losing(asyncio.Queue[Any]):
    """Loses the server where the first bytes come."""

    def __init__(self, fetcher: WeightsFetcher) -> None:
        super().__init__()
        self._fetcher = fetcher

    def put_nowait(self, item: Any) -> None:
        if item is not None and isinstance(item[0], WeightsBytes):
            self._fetcher.peer_gone("trainer")
        else:
            super().put_nowait(item)


# The rules, in one process.


class Inline:
    """Both sides on one hub, where the test sees what is said."""

    def __init__(self, path: Path, **given: Any) -> None:
        hub = InlineHub()
        here, there = hub.endpoint("fetcher"), hub.endpoint("trainer")
        here.connect("trainer", there.address)
        there.connect("fetcher", here.address)
        self.there = WeightsDirectory(path / "there", keep=2)
        self.here = WeightsDirectory(path / "here", keep=2)
        self.server = WeightsServer(there, self.there)
        self.fetcher = WeightsFetcher(here, "trainer", self.here, **given)
        self.said: list[Message] = []
        here.on_message = self._to_fetcher
        there.on_message = self._to_server

    def _to_fetcher(self, sender: str, message: Message, payload: Any) -> None:
        assert isinstance(message, ForFetcher)
        self.said.append(message)
        self.fetcher.received(sender, message, payload)

    def _to_server(self, sender: str, message: Message, payload: Any) -> None:
        assert isinstance(message, ForServer)
        self.said.append(message)
        self.server.received(sender, message)


def test_only_the_parts_that_a_node_needs_cross(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns and nothing of a tensor; buckets cut anywhere, also within an element."""
    monkeypatch.setattr(serving_module, "BUCKET_BYTES", 1001)
    state = state_at(3)
    parts: dict[str, Box] = {
        "layer.weight": ((0, 40), (10, 20)),
        "layer.half": ((3, 17), (0, 40)),
        "layer.double": ((0, 17),),
        "mask": ((5, 5),),
        "scale": (),
    }

    async def main() -> None:
        both = Inline(tmp_path, parts=parts)
        both.there.publish(0, 3, state.items())
        assert await both.fetcher.fetch() is not None
        expected = {n: state[n][within(box, whole(state[n].shape))] for n, box in parts.items()}
        assert checksum(both.here.load(0, 3)) == checksum(expected)
        assert both.server.bytes_sent == size_of(expected)
        assert len([m for m in both.said if isinstance(m, WeightsBytes)]) > 2

    run(main)


def test_at_most_two_buckets_are_on_their_way(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is copied while the next arrives; the file is held until the last is taken."""
    monkeypatch.setattr(serving_module, "BUCKET_BYTES", 500)

    async def main() -> None:
        both = Inline(tmp_path)
        inode = inode_of(both.there.publish(0, 0, first_state().items()))
        answers = both.fetcher._answers
        kept: list[Any] = []
        came = asyncio.Event()

        def keep(item: Any) -> None:
            if isinstance(item[0], WeightsBytes):
                kept.append(item)
                came.set()
            else:
                asyncio.Queue.put_nowait(answers, item)

        answers.put_nowait = keep  # type: ignore[method-assign]
        fetching = asyncio.create_task(both.fetcher.fetch())
        while len(kept) < exchange_module.NUM_BUCKETS:
            await came.wait()
            came.clear()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(kept) == exchange_module.NUM_BUCKETS
        for version in (1, 2, 3):
            published = both.there.publish(0, version, first_state().items())
            assert inode_of(published) != inode
        del answers.put_nowait
        for item in kept:
            answers.put_nowait(item)
        found = await fetching
        assert found is not None
        assert found.version == (0, 0), "it is the version that was asked for"

    run(main)


def test_a_version_that_is_replaced_meanwhile_is_asked_for_again(run: Run, tmp_path: Path) -> None:
    """The newest is fetched instead."""

    async def main() -> None:
        both = Inline(tmp_path)
        both.there.publish(0, 0, first_state().items())
        received = both.fetcher.received

        def late(sender: str, message: ForFetcher, payload: Any) -> None:
            if isinstance(message, WeightsNewest) and message.version == (0, 0):
                for version in (1, 2, 3):
                    both.there.publish(0, version, state_at(version).items())
            received(sender, message, payload)

        both.fetcher.received = late  # type: ignore[method-assign]
        found = await both.fetcher.fetch()
        assert found is not None
        assert found.version == (0, 3)
        assert checksum(both.here.load(0, 3)) == checksum(state_at(3))

    run(main)


def test_a_delta_that_does_not_fit_is_replaced_by_all_of_it(run: Run, tmp_path: Path) -> None:
    """The copy that is here was damaged: the checksum says so, and no receiver sees the result."""

    async def main() -> None:
        both = Inline(tmp_path)
        publisher = WeightsDirectory(tmp_path / "there", variant="delta")
        publisher.publish(0, 0, first_state().items())
        published = await both.fetcher.fetch()
        assert published is not None
        damage(published)
        changed = first_state()
        changed["scale"] += 1
        assert publisher.publish(0, 1, changed.items()).variant == "delta"
        found = await both.fetcher.fetch()
        assert isinstance(found, WeightsPublished)
        assert found.variant == "full"
        assert checksum(both.here.load(0, 1)) == checksum(changed)

    run(main)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"other": ()}, "other is no tensor of this version"),
        ({"layer.weight": ((0, 41), (0, 30))}, "there is no part"),
        ({"layer.weight": ((-1, 4), (0, 30))}, "there is no part"),
        ({"layer.weight": ((0, 4),)}, "there is no part"),
    ],
)
def test_parts_that_there_are_not_are_refused(
    run: Run, tmp_path: Path, parts: dict[str, Box], says: str
) -> None:
    """By the server, which says why; nothing outside a tensor is read."""

    async def main() -> None:
        both = Inline(tmp_path, parts=parts)
        both.there.publish(0, 0, first_state().items())
        with pytest.raises(VersionGone, match="times while they were asked for") as caught:
            await both.fetcher.fetch()
        assert both.server.bytes_sent == 0
        assert says in str(caught.value.__context__ or "") or any(
            says in getattr(message, "reason", "") for message in both.said
        )

    run(main)


def test_a_fetcher_that_is_cancelled_leaves_nothing_and_asks_again(
    run: Run, tmp_path: Path
) -> None:
    """What still comes for the earlier request is dropped."""

    async def main() -> None:
        both = Inline(tmp_path)
        both.there.publish(0, 0, first_state().items())
        for turns in range(1, 30, 4):
            fetching = asyncio.create_task(both.fetcher.fetch())
            for _ in range(turns):
                await asyncio.sleep(0)
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)
        await both.fetcher.fetch()
        assert checksum(both.here.load(0, 0)) == checksum(first_state())
        assert not list((tmp_path / "here").glob("*.partial"))

    run(main)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda payload: payload[:1], "fewer bytes"),
        (lambda payload: [*payload, np.zeros(1, np.uint8)], "more bytes"),
        (None, "bucket 1 of weights came where 0"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(
    run: Run, tmp_path: Path, change: Any, says: str
) -> None:
    """More or fewer than the header says, or another bucket than the next."""

    async def main() -> None:
        both = Inline(tmp_path)
        both.there.publish(0, 0, first_state().items())
        received = both.fetcher.received

        def wrong(sender: str, message: ForFetcher, payload: Any) -> None:
            if isinstance(message, WeightsBytes):
                if change is None:
                    message = WeightsBytes(request=message.request, index=1, last=False)
                else:
                    payload = change(payload)
            received(sender, message, payload)

        both.fetcher.received = wrong  # type: ignore[method-assign]
        with pytest.raises(BadFrame, match=says):
            await both.fetcher.fetch()
        assert both.here.newest() is None

    run(main)


def test_messages_of_the_exchange_survive_the_wire() -> None:
    """Boxes come back as they were, and the lane is not sent."""
    asked = WeightsFileAsked(request=3, version=(0, 1), parts={"w": ((0, 4), (2, 3)), "s": ()})
    assert decode(encode(asked)) == asked
    assert asked.channel == "weights"
