"""Checkpoints on disk: written in three calls, read back by any number of ranks, removed when they are old."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from actors.conductor.manifest import Manifest, checkpoint_dir, newest_manifest
from actors.errors import BadCheckpoint, CheckpointNotWritten
from actors.trainer import checkpoint, shard_files
from actors.trainer.checkpoint import CheckpointWriter
from actors.trainer.config import CheckpointConfig
from actors.trainer.shard_files import shard_file

torch.set_num_threads(1)
SPAWN = multiprocessing.get_context("spawn")
ROWS, COLUMNS = 5, 3  # rows that two ranks share unevenly


def make_state() -> dict[str, torch.Tensor]:
    """A state of every kind that there is: matrices, a counter, half precision, a tensor without elements."""
    rows = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    return {
        "steps": torch.tensor(7),
        "model.weight": rows,
        "model.bias": torch.arange(ROWS).bfloat16(),
        "model.nothing": torch.empty(0, 4),
        "exp_avg.weight": rows * 0.5,
    }


class Engine:
    """Of an engine only what a checkpoint needs."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        if "steps" not in state:
            raise ValueError("steps is missing")
        self.loaded = dict(state)


def commit(
    run_dir: Path, step: int, state: dict[str, torch.Tensor] | None = None, **config: Any
) -> None:
    writer = CheckpointWriter(run_dir, CheckpointConfig(**config))
    writer.stage(step, make_state() if state is None else state)
    writer.write()
    writer.commit(Manifest(step=step, policy_version=step, run_attempt=0))


def load(run_dir: Path) -> dict[str, torch.Tensor]:
    engine: Any = Engine()
    checkpoint.load(run_dir, engine)
    found: dict[str, torch.Tensor] = engine.loaded
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    commit(tmp_path, 3)
    assert_equal(load(tmp_path), make_state())


def test_what_changes_after_staging_is_not_written(tmp_path: Path) -> None:
    """The training goes on while the copy is written; the next commit has what it was by then."""
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    state = make_state()
    for step in (1, 2):
        expected = {name: tensor.clone() for name, tensor in state.items()}
        writer.stage(step, state)
        for tensor in state.values():
            tensor += 1
        writer.write()
        writer.commit(Manifest(step=step, policy_version=step, run_attempt=0))
        assert_equal(load(tmp_path), expected)


def test_without_its_manifest_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    writer.stage(2, {"steps": torch.tensor(2)})
    writer.write()
    newest = newest_manifest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert_equal(load(tmp_path), make_state())


def test_older_policies_stay_with_their_commit(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig())
    policies = {v: {"weight": torch.full((2,), float(v))} for v in (11, 9, 10)}
    writer.stage(12, make_state(), policies)
    writer.write()
    writer.commit(Manifest(step=12, policy_version=12, run_attempt=0))
    found = checkpoint.load_policies(tmp_path, 12)
    assert list(found) == [9, 10, 11]
    assert_equal(found[9], policies[9])
    assert_equal(load(tmp_path), make_state())


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.write_bytes(b"\0" * 100),
        lambda file: shard_files.save_file({"steps": torch.tensor(1)}, file),
    ],
    ids=["gone", "cut off", "zeros", "not one of ours"],
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    commit(tmp_path, 4)
    harm(checkpoint_dir(tmp_path, 4) / shard_file(0))
    with pytest.raises(BadCheckpoint, match=r"step-00000004 .*remove that directory to go on"):
        load(tmp_path)


def test_a_state_that_does_not_fit_the_engine_is_named(tmp_path: Path) -> None:
    commit(tmp_path, 4, {"model.weight": torch.zeros(1)})
    with pytest.raises(BadCheckpoint, match=r"step-00000004 cannot be loaded: steps is missing"):
        load(tmp_path)


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(CheckpointNotWritten, match="the commit before is whole"):
        commit(tmp_path, 1)


def test_only_the_newest_commits_stay(tmp_path: Path) -> None:
    for step in range(4):
        commit(tmp_path, step, keep=2)
    assert sorted(d.name for d in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_what_a_crash_left_of_a_later_step_does_not_push_a_commit_out(tmp_path: Path) -> None:
    commit(tmp_path, 10, keep=1)
    unfinished = checkpoint_dir(tmp_path, 20)
    unfinished.mkdir()
    (unfinished / shard_file(0)).write_bytes(b"half")
    commit(tmp_path, 15, keep=1)
    newest = newest_manifest(tmp_path)
    assert newest is not None
    assert newest.step == 15
    assert not unfinished.exists()


# Ranks, each in a process of its own.


def join_ranks(rank: int, num_ranks: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/join", rank=rank, world_size=num_ranks
    )


def sharded(num_ranks: int) -> dict[str, torch.Tensor]:
    """The state as FSDP has it: matrices and vectors by rows, counters on every rank."""
    mesh = init_device_mesh("cpu", (num_ranks,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) if tensor.dim() else tensor
        for name, tensor in make_state().items()
    }


def write_as_rank(rank: int, num_ranks: int, folder: str, shards: bool) -> None:
    join_ranks(rank, num_ranks, folder)
    group = dist.new_group(backend="gloo")
    writer = CheckpointWriter(Path(folder), CheckpointConfig(), group)
    writer.stage(1, sharded(num_ranks) if shards else make_state())
    writer.write()
    if rank == 0:
        writer.commit(Manifest(step=1, policy_version=1, run_attempt=0))
    dist.barrier()
    dist.destroy_process_group()


def write_with_a_bad_rank(rank: int, num_ranks: int, folder: str) -> None:
    """Rank 1's disk is full."""
    join_ranks(rank, num_ranks, folder)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        shard_files.save_file = refuse
    writer = CheckpointWriter(Path(folder), CheckpointConfig(), dist.new_group(backend="gloo"))
    writer.stage(1, make_state())
    with pytest.raises(CheckpointNotWritten, match="No space left on device"):
        writer.write()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 7])
def test_ranks_write_their_shards_and_any_number_reads_the_whole(
    tmp_path: Path, num_ranks: int
) -> None:
    """Bit for bit; also with rows for only five of seven ranks. A rank's file that is missing is missed."""
    run_ranks(num_ranks, write_as_rank, num_ranks, str(tmp_path), True)
    directory = checkpoint_dir(tmp_path, 1)
    for rank in range(min(num_ranks, ROWS)):
        keys = shard_files.safe_open(directory / shard_file(rank), "pt").keys()
        assert any(key.startswith("model.weight[") for key in keys)
    assert_equal(load(tmp_path), make_state())
    (directory / shard_file(1)).unlink()
    with pytest.raises(BadCheckpoint, match=r"state-1\.safetensors"):
        load(tmp_path)


def test_what_is_the_same_on_every_rank_is_written_once(tmp_path: Path) -> None:
    run_ranks(2, write_as_rank, 2, str(tmp_path), False)
    directory = checkpoint_dir(tmp_path, 1)
    names = [set(shard_files.safe_open(directory / shard_file(r), "pt").keys()) for r in (0, 1)]
    assert names[0] | names[1] == make_state().keys()
    assert not names[0] & names[1]
    assert_equal(load(tmp_path), make_state())


def test_every_rank_learns_that_one_could_not_write(tmp_path: Path) -> None:
    """Without that the leader would make a checkpoint count that lacks a part."""
    run_ranks(2, write_with_a_bad_rank, 2, str(tmp_path))
    assert newest_manifest(tmp_path) is None


# A crash.


def write_and_stop_before_sync(folder: str) -> None:
    """Write the second checkpoint; stop with its bytes in the file, before they are synced."""
    torch.set_num_threads(1)

    def stop(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    shard_files.sync = stop
    commit(Path(folder), 2, {"steps": torch.tensor(2)})


def test_kill_in_mid_write_leaves_the_commit_before_whole(tmp_path: Path) -> None:
    """kill -9 between the first byte and the manifest; the next attempt at the step replaces what was left."""
    commit(tmp_path, 1)
    writing = SPAWN.Process(target=write_and_stop_before_sync, args=(str(tmp_path),))
    writing.start()
    assert writing.pid is not None
    seen = os.waitid(os.P_PID, writing.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert seen is not None
    assert seen.si_code == os.CLD_STOPPED
    left = checkpoint_dir(tmp_path, 2) / shard_file(0)
    assert left.stat().st_size > 0, "it is in the middle of the write"
    writing.kill()
    writing.join()
    newest = newest_manifest(tmp_path)
    assert newest is not None
    assert newest.step == 1
    assert_equal(load(tmp_path), make_state())
    commit(tmp_path, 2)
    assert_equal(load(tmp_path), make_state())
    assert {d.name for d in (tmp_path / "checkpoints").iterdir()} == {
        "step-00000001",
        "step-00000002",
    }
