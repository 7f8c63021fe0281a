"""Ranks that write their shards into one version, and what a DTensor says of its layout."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from weights_rank import rank_of

from channels.errors import ChannelError, VersionGone
from channels.weights import WeightsDirectory
from channels.weights import directory as directory_module
from channels.weights.sharded import Outline, ShardWriter, held, local, outline
from channels.weights.shards import Box, Cut, plan, shape_of, shard, whole, within

RANKS = 4


def ones(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((4,), [Shard(0)]),
        ((4,), [Shard(1)]),
        ((4,), [Replicate()]),
        ((2, 2), [Replicate(), Shard(0)]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Shard(1), Shard(0)]),
        ((2, 2), [Shard(0), Shard(0)]),
    ],
)
@pytest.mark.parametrize("shape", [(7, 3), (2, 9), (8, 4), (1, 1)])
def test_boxes_are_what_torch_gives_each_rank(
    mesh: tuple[int, ...], placements: list[Any], shape: tuple[int, int]
) -> None:
    """Uneven and empty shards included; every rank knows the boxes of all."""
    seen = set()
    for rank in range(RANKS):
        with rank_of(rank, RANKS):
            whole_one = ones(*shape)
            tensor = distribute_tensor(
                whole_one, init_device_mesh("cpu", mesh), placements, src_data_rank=None
            )
            boxes = held(tensor, RANKS)
            seen.add(boxes)
            assert torch.equal(local(tensor), whole_one[within(boxes[rank], whole(shape))])
    assert len(seen) == 1


def test_fsdp_over_tensor_parallel_layers() -> None:
    """FSDP2 divides each tensor-parallel shard again: rows of rows, and rows of columns."""
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5, bias=False))
    for rank in range(RANKS):
        with rank_of(rank, RANKS):
            model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5, bias=False))
            model.load_state_dict(expected.state_dict())
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            parallelize_module(
                model,
                mesh["tp"],
                {
                    "0": ColwiseParallel(),
                    "1": RowwiseParallel(),
                },
                src_data_rank=None,
            )
            fully_shard(model, mesh=mesh["dp"])
            for name, parameter in model.named_parameters():
                full = dict(expected.named_parameters())[name]
                boxes = held(parameter, RANKS)
                box = boxes[rank]
                assert torch.equal(local(parameter), full.detach()[within(box, whole(full.shape))])
                plan({name: boxes}, {name: (whole(full.shape),)}, {name: 4})  # nothing is missing


def test_layouts_that_are_no_weights_are_refused() -> None:
    """Partial sums, and a mesh of some of the ranks."""
    with rank_of(0, RANKS):
        mesh = init_device_mesh("cpu", (4,))
        tensor = distribute_tensor(ones(4, 4), mesh, [Shard(0)], src_data_rank=None)
        with pytest.raises(ValueError, match="a trainer of 8 ranks"):
            held(tensor, 8)
        summed = type(tensor).from_local(ones(4, 4), mesh, [Partial()], run_check=False)
        with pytest.raises(ValueError, match="only shards and replicas"):
            held(summed, 4)


def test_a_plain_tensor_is_whole_on_every_rank_and_each_writes_a_share(tmp_path: Path) -> None:
    """Masters are converted as they are written; what is not a floating tensor keeps its dtype."""
    tensors = {f"layer.{i}": ones(5, 7 + i) + i for i in range(8)} | {"steps": torch.tensor(3)}
    weights = WeightsDirectory(tmp_path)
    made = outline(tensors, "bfloat16")
    assert made["layer.0"] == Outline(torch.bfloat16, (5, 7))
    assert made["steps"].nbytes == 8
    with weights.begin(0, 0, made) as publication:
        before = {name: tensor.clone() for name, tensor in publication.tensors.items()}
        ShardWriter(0, 2).write(publication.tensors, tensors)
        half = [n for n, t in publication.tensors.items() if not torch.equal(t, before[n])]
        assert 0 < len(half) < len(tensors)
        ShardWriter(1, 2).write_file(publication.path, tensors)
        assert weights.newest() is None, "nobody sees it before all have written"
        publication.finish()
    found = weights.load(0, 0)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.to(made[name].dtype))


def test_a_version_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    """Its ranks are told, and so is who comes late."""
    weights = WeightsDirectory(tmp_path)
    with weights.begin(0, 0, outline({"w": ones(3, 3)})) as publication:
        path = publication.path
    assert os.listdir(tmp_path) == []
    with pytest.raises(VersionGone, match="its leader gave it up"):
        ShardWriter(1, 2).write_file(path, {"w": ones(3, 3)})
    assert weights.newest() is None


def test_no_room_is_told_before_anybody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a bus error of some rank."""
    monkeypatch.setattr(directory_module, "_free_bytes", lambda path: 10)
    with pytest.raises(ChannelError, match="has 10 bytes"):
        WeightsDirectory(tmp_path).begin(0, 0, outline({"w": ones(3, 3)}))
    assert os.listdir(tmp_path) == []


def test_a_tensor_parallel_receiver_reads_its_slices_only(tmp_path: Path) -> None:
    """Views of the mapped file; rows for one kind of layer, columns for the other."""
    state = {"column.weight": ones(10, 6), "row.weight": ones(6, 10), "norm.weight": ones(6)}
    weights = WeightsDirectory(tmp_path)
    weights.publish(0, 0, state.items())
    dims = {"column.weight": 0, "row.weight": 1}
    with weights.borrow(0, 0) as found:
        assert isinstance(found, dict)
        for rank in range(2):
            for name, tensor in state.items():
                box = _part(tensor, dims.get(name), rank)
                mine = found[name][within(box, whole(tensor.shape))]
                assert mine.shape == shape_of(box)
                assert mine.untyped_storage().data_ptr() == found[name].untyped_storage().data_ptr()
                expected = tensor if name not in dims else tensor.chunk(2, dims[name])[rank]
                assert torch.equal(mine, expected)


def _part(tensor: torch.Tensor, dim: int | None, rank: int) -> Box:
    return shard(tensor.shape, (2,), [] if dim is None else [Cut(0, dim)])[rank]
