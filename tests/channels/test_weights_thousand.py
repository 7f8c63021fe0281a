"""A thousand random updates by every way that weights can go: the same bits on both sides after each."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_fakes import FakeDevice, FakeNode
from weights_rank import Shards, rank_of

from channels.messages import Message
from channels.socket_endpoint import SocketEndpoint
from channels.weights import WeightsDirectory
from channels.weights.delta import WeightsDelta, as_integers
from channels.weights.device import ALIGNMENT_BYTES, DevicePublisher, DeviceReceiver
from channels.weights.device_messages import WeightsBucket
from channels.weights.exchange import ForFetcher, ForServer
from channels.weights.fetching import WeightsFetcher
from channels.weights.serving import WeightsServer
from channels.weights.sharded import ShardWriter, outline

UPDATES = 1000
RANKS = 2
BASE = (0, 0)
State = dict[str, torch.Tensor]


def first() -> State:
    """Rows that do not divide evenly, columns, replicas, a bucket and more."""
    return {
        "layer.weight": torch.zeros(12, 10),
        "layer.half": torch.zeros(101, 4, dtype=torch.bfloat16),
        "one.row": torch.zeros(1, 5, dtype=torch.float64),
        "mask": torch.zeros(9, dtype=torch.bool),
        "scale": torch.zeros(()),
    }


def update(state: State, number: int) -> None:
    """Random bits in random places: few, or all."""
    random = np.random.default_rng(number)
    fraction = random.choice([0.02, 1.0], p=[0.9, 0.1])
    for tensor in state.values():
        flat = as_integers(tensor)
        places = torch.from_numpy(random.random(flat.numel()) < fraction)
        drawn = torch.from_numpy(
            random.integers(0, 256, flat.numel() * flat.element_size(), np.uint8)
        )
        values = drawn.view(flat.dtype)[places]
        flat[places] = values & 1 if tensor.dtype == torch.bool else values


def assert_same(found: Mapping[str, torch.Tensor], expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(as_integers(found[name]), as_integers(tensor)), name


class Host:
    """Full or delta, by the node's host copy."""

    def __init__(self, path: Path, variant: str) -> None:
        self.publisher = WeightsDirectory(path, keep=2, variant=variant)
        self.receiver = WeightsDirectory(path)
        self.state: State = first()
        self.held = (-1, -1)
        self.variants: set[str] = set()

    def publish(self, number: int, state: State) -> None:
        self.variants.add(self.publisher.publish(0, number, state.items()).variant)

    def go(self, number: int, state: State) -> Mapping[str, torch.Tensor]:
        """Publish, receive; what is received now."""
        self.publish(number, state)
        with self.receiver.borrow(0, number, self.held) as found:
            if isinstance(found, WeightsDelta):
                found.apply(self.state)
            else:
                for name, tensor in found.items():
                    self.state[name].copy_(tensor)
        self.held = (0, number)
        return self.state

    def close(self) -> None:
        """Nothing is open."""


class Adapter(Host):
    """Some tensors on top of a base that was published once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "full")
        super().publish(0, first())

    def publish(self, number: int, state: State) -> None:
        published = self.publisher.publish(0, number, state.items(), base=BASE)
        self.variants.add(published.variant)

    def close(self) -> None:
        assert_same(self.receiver.load(*BASE), first())


class Sharded(Host):
    """Two ranks with DTensors write one file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "full")
        self.shards: list[Shards] = []
        for rank in range(RANKS):
            with rank_of(rank, RANKS):
                self.shards.append(Shards(first(), RANKS))
        self.writers = [ShardWriter(rank, RANKS) for rank in range(RANKS)]

    def publish(self, number: int, state: State) -> None:
        for rank, shards in enumerate(self.shards):
            shards.refresh(state, rank)
        with self.publisher.begin(0, number, outline(self.shards[0].tensors)) as publication:
            self.writers[0].write(publication.tensors, self.shards[0].tensors)
            self.writers[1].write_file(publication.path, self.shards[1].tensors)
            self.variants.add(publication.finish().variant)


class Device:
    """Bucket by bucket over device memory, from the shards of two ranks or from one that has everything."""

    def __init__(self, path: Path, ranks: int) -> None:
        node = FakeNode()
        self.state = first()
        self.receiver = DeviceReceiver(FakeDevice(node, "GPU-receiver"), self.state)
        self.shards: list[Shards] = []
        if ranks > 1:
            for rank in range(ranks):
                with rank_of(rank, ranks):
                    self.shards.append(Shards(first(), ranks))
        self.publishers = [
            DevicePublisher(
                FakeDevice(node, f"GPU-{rank}"),
                self.sender(rank),
                4 * ALIGNMENT_BYTES,
                rank=rank,
                num_ranks=ranks,
            )
            for rank in range(ranks)
        ]

    def sender(self, rank: int) -> Callable[[str, WeightsBucket], None]:
        def send(name: str, bucket: WeightsBucket) -> None:
            self.receiver.take(bucket)
            self.publishers[rank].taken(name, bucket.taken())

        return send

    def go(self, number: int, state: State) -> Mapping[str, torch.Tensor]:
        for rank, publisher in enumerate(self.publishers):
            given: Mapping[str, torch.Tensor] = state
            if self.shards:
                self.shards[rank].refresh(state, rank)
                given = self.shards[rank].tensors
            publisher.add_receiver("rollout-0")
            assert publisher.publish(0, number, given.items()) == ["rollout-0"]
        assert self.receiver.held == (0, number)
        return self.state

    def close(self) -> None:
        self.receiver.close()
        for publisher in self.publishers:
            publisher.close()


ROUTES: dict[str, Callable[[Path], Any]] = {
    "full": lambda path: Host(path, "full"),
    "delta": lambda path: Host(path, "delta"),
    "adapter": Adapter,
    "sharded": Sharded,
    "device": lambda path: Device(path, 1),
    "device, sharded": lambda path: Device(path, RANKS),
}


@pytest.mark.parametrize("route", ROUTES)
def test_both_sides_have_the_same_bits_after_every_update(tmp_path: Path, route: str) -> None:
    """Whatever is sent: everything, changes, an adapter, shards, buckets."""
    made = ROUTES[route](tmp_path)
    state = first()
    for number in range(1, UPDATES + 1):
        update(state, number)
        assert_same(made.go(number, state), state)
    made.close()
    if isinstance(made, Host):
        assert made.variants >= {route if route in ("delta", "adapter") else "full"}


def test_two_nodes_have_the_same_bits_after_every_update(tmp_path: Path) -> None:
    """Over TCP: deltas where they lead there, all of it after a gap or where all changed, adapters among them."""
    random = np.random.default_rng(0)

    async def main() -> set[str]:
        there = WeightsDirectory(tmp_path / "there", keep=3, variant="delta")
        here = WeightsDirectory(tmp_path / "here", keep=3)
        one, other = (
            SocketEndpoint(n, f"tcp://127.0.0.{i}:*") for i, n in enumerate("ab", start=1)
        )
        server, fetcher = WeightsServer(one, there), WeightsFetcher(other, "a", here)
        one.connect("b", other.address)
        other.connect("a", one.address)

        def to_server(sender: str, message: Message, payload: Any) -> None:
            assert isinstance(message, ForServer)
            server.received(sender, message)

        def to_fetcher(sender: str, message: Message, payload: Any) -> None:
            assert isinstance(message, ForFetcher)
            fetcher.received(sender, message, payload)

        one.on_message, other.on_message = to_server, to_fetcher
        state, base, variants = first(), None, set()
        for number in range(1, UPDATES + 1):
            update(state, number)
            adapter = base is not None and random.random() < 0.2
            there.publish(0, number, state.items(), base=base if adapter else None)
            base = base if adapter else (0, number)
            if random.random() < 0.7 and number < UPDATES:
                continue
            published = await fetcher.fetch()
            assert published is not None
            assert published.version == (0, number)
            variants.add(published.variant)
            assert_same(here.load(0, number), state)
        await server.close()
        one.close()
        other.close()
        return variants

    assert asyncio.run(main()) == {"full", "delta", "adapter"}
