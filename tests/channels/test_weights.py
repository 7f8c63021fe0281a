"""The node's host copy of weights."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from channels.errors import BadFrame, ChannelError, VersionGone
from channels.weights import WeightsDirectory
from channels.weights import directory as weights


def model(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and layouts."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 5, generator=generator),
        "b.weight": torch.randn(3, 11, generator=generator).to(torch.bfloat16).t(),
        "c.mask": torch.rand(9, generator=generator) > 0.5,
        "d.scale": torch.tensor(float(seed)),
        "e.empty": torch.empty(0, 4, dtype=torch.float16),
        "f.float8": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Equality bit by bit."""
    return left.keys() == right.keys() and all(
        left[name].dtype == tensor.dtype
        and left[name].shape == tensor.shape
        and left[name].contiguous().reshape(-1).view(torch.uint8).tolist()
        == tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        for name, tensor in right.items()
    )


def test_what_was_published_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    """Every dtype, shape and layout comes back as it was."""
    directory = WeightsDirectory(tmp_path)
    published = directory.publish(0, 3, model(3).items())
    assert (published.run_attempt, published.policy_version) == (0, 3)
    assert published.size_bytes == Path(published.path).stat().st_size
    assert same(WeightsDirectory(tmp_path).load(0, 3), model(3))


def test_file_is_what_safetensors_itself_reads(tmp_path: Path) -> None:
    """The file is plain safetensors, so any tool opens it."""
    published = WeightsDirectory(tmp_path).publish(2, 5, model(1).items())
    with safe_open(published.path, framework="pt") as file:
        assert file.metadata() == {"run_attempt": "2", "policy_version": "5"}
        assert same({name: file.get_tensor(name) for name in file.keys()}, model(1))


def test_only_the_newest_stay_and_older_ones_are_gone(tmp_path: Path) -> None:
    """keep = 2: the third version replaces the first, and loading the first says so."""
    directory = WeightsDirectory(tmp_path, keep=2)
    assert directory.newest() is None
    for version in range(3):
        directory.publish(0, version, model(version).items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "weights-000000-0000000001.safetensors",
        "weights-000000-0000000002.safetensors",
    ]
    with pytest.raises(VersionGone, match="version 0 of run attempt 0"):
        directory.load(0, 0)
    newest = directory.newest()
    assert newest is not None
    assert newest.policy_version == 2


def test_rolled_back_job_may_repeat_a_version_number(tmp_path: Path) -> None:
    """Run attempt 1's version 4 is newer than run attempt 0's version 9, and neither is mistaken."""
    directory = WeightsDirectory(tmp_path, keep=3)
    directory.publish(0, 4, model(1).items())
    directory.publish(0, 9, model(2).items())
    directory.publish(1, 4, model(3).items())
    newest = directory.newest()
    assert newest is not None
    assert (newest.run_attempt, newest.policy_version) == (1, 4)
    assert same(directory.load(0, 4), model(1))
    assert same(directory.load(1, 4), model(3))


def test_same_version_published_again_replaces_it(tmp_path: Path) -> None:
    """A restarted trainer publishes the version it was restored to."""
    directory = WeightsDirectory(tmp_path, keep=2)
    directory.publish(0, 1, model(1).items())
    before = directory.load(0, 1)
    directory.publish(0, 1, model(2).items())
    assert same(directory.load(0, 1), model(2))
    assert same(before, model(1))


def test_space_of_the_leaving_version_is_used_again(tmp_path: Path) -> None:
    """The file that nobody maps is written over: its pages exist already."""
    directory = WeightsDirectory(tmp_path, keep=2)
    first = os.stat(directory.publish(0, 0, model(0).items()).path).st_ino
    directory.publish(0, 1, model(1).items())
    third = os.stat(directory.publish(0, 2, model(2).items()).path).st_ino
    assert third == first
    assert same(directory.load(0, 2), model(2))
    directory.publish(0, 3, [("only", torch.ones(2))])  # shorter than what lay there
    assert same(directory.load(0, 3), {"only": torch.ones(2)})


def test_loaded_tensors_outlive_their_version(tmp_path: Path) -> None:
    """A mapped file is never written over, however many versions follow."""
    directory = WeightsDirectory(tmp_path, keep=2)
    directory.publish(0, 0, model(0).items())
    kept = directory.load(0, 0)["a.weight"]  # one tensor is enough to hold the mapping
    for version in range(1, 5):
        directory.publish(0, version, model(version).items())
    assert kept.equal(model(0)["a.weight"])


def test_reader_in_another_process_protects_what_it_maps(tmp_path: Path) -> None:
    """The lock is the operating system's: another process's mapping counts, and ends with it."""
    directory = WeightsDirectory(tmp_path, keep=2)
    directory.publish(0, 0, model(0).items())
    script = (
        "import sys; from channels.weights import WeightsDirectory\n"
        "tensors = WeightsDirectory(sys.argv[1]).load(0, 0)\n"
        "print('mapped', flush=True); sys.stdin.readline()\n"
        "print(float(tensors['d.scale']), float(tensors['a.weight'].sum()), flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "mapped\n"
        for version in range(1, 4):
            directory.publish(0, version, model(version).items())
        output, _ = reader.communicate("go on\n", timeout=30)
    assert output.split() == ["0.0", str(float(model(0)["a.weight"].sum()))]


def test_writing_to_loaded_tensors_changes_nobody_elses(tmp_path: Path) -> None:
    """Mappings are private."""
    directory = WeightsDirectory(tmp_path)
    directory.publish(0, 0, model(0).items())
    directory.load(0, 0)["a.weight"].zero_()
    assert same(directory.load(0, 0), model(0))


def test_version_taken_between_open_and_lock_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that opened the file just before its space was re-used must not read the new bytes."""
    directory = WeightsDirectory(tmp_path, keep=2)
    for version in range(2):
        directory.publish(0, version, model(version).items())
    flock = fcntl.flock

    def late(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        directory.publish(0, 2, model(2).items())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(VersionGone):
        directory.load(0, 0)


def test_directory_without_room_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/shm too small: the run directory takes the weights; none at all is an error with sizes."""
    small, large = tmp_path / "shm", tmp_path / "run"
    directory = WeightsDirectory([small, large])
    free = {small: 1000, large: 10**12}
    monkeypatch.setattr(weights, "_free_bytes", free.__getitem__)
    published = directory.publish(0, 0, model(0).items())
    assert Path(published.path).parent == large
    assert same(directory.load(0, 0), model(0))
    free[large] = 2000
    with pytest.raises(ChannelError, match=r"has 1000 bytes.*has 2000 bytes"):
        directory.publish(0, 1, model(1).items())
    assert same(directory.load(0, 0), model(0))


def test_failed_publish_leaves_no_file(tmp_path: Path) -> None:
    """A dtype that safetensors cannot hold is refused before anything is written."""
    directory = WeightsDirectory(tmp_path)
    with pytest.raises(ValueError, match="complex128"):
        directory.publish(0, 0, [("x", torch.zeros(2, dtype=torch.complex128))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [b"", b"short", b"\xff" * 64, b"\x02" + bytes(7) + b"{]"],
    ids=["empty", "short", "length", "json"],
)
def test_damaged_file_is_a_clear_error(tmp_path: Path, damage: bytes) -> None:
    """Bytes that are not safetensors never reach the model."""
    directory = WeightsDirectory(tmp_path)
    path = Path(directory.publish(0, 0, model(0).items()).path)
    path.write_bytes(damage)
    with pytest.raises(BadFrame, match="weights-000000"):
        directory.load(0, 0)


def test_clear_removes_versions_and_left_overs(tmp_path: Path) -> None:
    """What a killed publisher left is removed with the rest."""
    directory = WeightsDirectory(tmp_path)
    directory.publish(0, 0, model(0).items())
    (tmp_path / ".99999.partial").write_bytes(b"half")
    directory.clear()
    assert list(tmp_path.iterdir()) == []


def test_publish_deletes_what_a_dead_publisher_was_writing(tmp_path: Path) -> None:
    """A trainer killed in mid-publish leaves a locked file; its successor finds the lock free."""
    script = (
        "import os, signal, sys; from pathlib import Path; from channels.weights.files import Space\n"
        "Space.make(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    directory = WeightsDirectory(tmp_path)
    directory.publish(0, 0, model(0).items())
    assert [path.name for path in tmp_path.iterdir()] == ["weights-000000-0000000000.safetensors"]


def test_header_that_points_outside_the_file_is_refused(tmp_path: Path) -> None:
    """Offsets are checked against shape, dtype and file before anything is mapped."""
    directory = WeightsDirectory(tmp_path)
    path = Path(directory.publish(0, 0, [("x", torch.ones(4))]).path)
    path.write_bytes(path.read_bytes().replace(b"[0, 16]", b"[8, 24]"))
    with pytest.raises(BadFrame, match='weights "x" do not lie where'):
        directory.load(0, 0)
