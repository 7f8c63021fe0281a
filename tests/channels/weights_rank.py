"""A rank of a trainer: its shards of the state of weights_publisher.py, written into the leader's file.

    python weights_rank.py RANK NUM_RANKS

Lines of stdin are JSON: the version, and the file. Torch's fake process group gives DTensors without other processes.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from weights_publisher import Tensors, first_state, update

from channels.weights.sharded import ShardWriter


@contextmanager
def rank_of(rank: int, num_ranks: int) -> Iterator[None]:
    """Be this rank for torch.distributed."""
    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def placement_of(name: str, tensor: torch.Tensor) -> Placement:
    """Rows, columns or replicas, so that all of them occur."""
    if name == "mask" or tensor.dim() == 0:
        return Replicate()
    return Shard(1 if name == "layer.weight" else 0)


class Shards:
    """One rank's DTensors of a state, refreshed in place."""

    def __init__(self, state: Tensors, num_ranks: int) -> None:
        mesh = init_device_mesh("cpu", (num_ranks,))
        self.tensors: dict[str, DTensor] = {
            name: distribute_tensor(
                tensor.clone(), mesh, [placement_of(name, tensor)], src_data_rank=None
            )
            for name, tensor in state.items()
        }
        self.num_ranks = num_ranks

    def refresh(self, state: Tensors, rank: int) -> None:
        """Take this rank's parts of a new state."""
        for name, tensor in state.items():
            placement, mine = placement_of(name, tensor), self.tensors[name].to_local()
            if isinstance(placement, Shard):
                parts = tensor.chunk(self.num_ranks, placement.dim)
                tensor = parts[rank] if rank < len(parts) else tensor[:0]
            mine.copy_(tensor)


def main() -> None:
    """Write until stdin ends."""
    rank, num_ranks = map(int, sys.argv[1:])
    with rank_of(rank, num_ranks):
        state, updates = first_state(), 0
        shards = Shards(state, num_ranks)
        writer = ShardWriter(rank, num_ranks)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            version, path = json.loads(line)
            while updates < version:
                updates += 1
                update(state, updates)
            shards.refresh(state, rank)
            writer.write_file(Path(path), dict(shards.tensors))
            print(json.dumps(version), flush=True)


if __name__ == "__main__":
    main()
