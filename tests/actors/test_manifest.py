"""The commit point on disk."""

import json
import sys
from types import FrameType
from typing import Any

import pytest

from actors.conductor.group_set import GroupSet
from actors.conductor.manifest import (
    FILE,
    Manifest,
    ManifestError,
    checkpoint_dir,
    newest_manifest,
    read_manifest,
    write_manifest,
)


def manifest(step: int, groups) -> Manifest:
    return Manifest(step=step, policy_version=step, run_attempt=1, groups=GroupSet.of(groups))


def test_the_newest_manifest_is_the_commit(tmp_path):
    """Directories without one were never committed; nothing partial is left over."""
    assert newest_manifest(tmp_path) is None
    for step in (0, 9, 10, 100_000_000):
        path = write_manifest(tmp_path, manifest(step, range(step % 50)))
        assert read_manifest(path) == manifest(step, range(step % 50))
        assert [p.name for p in path.parent.iterdir()] == [FILE]
        checkpoint_dir(tmp_path, step + 1).mkdir(exist_ok=True)
        newest = newest_manifest(tmp_path)
        assert newest is not None
        assert newest.step == step


def test_a_crash_before_the_rename_commits_nothing(tmp_path, monkeypatch):
    """The rename is the commit: with everything else written, the old manifest still counts."""
    write_manifest(tmp_path, manifest(1, [0]))

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr("actors.conductor.manifest.os.replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_manifest(tmp_path, manifest(2, [0, 1]))
    assert newest_manifest(tmp_path) == manifest(1, [0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 4}, "it says step 4"),
        ({"groups": [[0, 3], [2, 5]]}, "ranges ascend and never touch"),
        ({"groups": [[0, 3], [3, 5]]}, "ranges ascend and never touch"),
        ({"groups": [[3, 3]]}, "ranges ascend"),
        ({"groups": [[-1, 3]]}, "ranges ascend"),
        ({"groups": [0, 1]}, "Expected `array`"),
        ({"step": "three"}, "Expected `int`"),
        ({"format": 7}, "format 7, and this version reads 2"),
    ],
)
def test_a_bad_manifest_is_refused(tmp_path, change, says):
    """What contradicts itself or its place is an error with a way out, never a guess."""
    path = write_manifest(tmp_path, manifest(3, [0, 1, 2]))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ManifestError, match=says):
        newest_manifest(tmp_path)


def test_a_cut_manifest_is_refused(tmp_path):
    """Half a file can only come from outside, and is said."""
    path = write_manifest(tmp_path, manifest(3, [0, 1, 2]))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ManifestError, match="remove its step's directory"):
        newest_manifest(tmp_path)


def lines_run(work: Any) -> int:
    """How many lines of Python the work takes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_a_commit_costs_the_same_however_many_groups_were_trained(tmp_path):
    """As many lines of Python and, but for the digits, as many bytes on disk after 10**12 groups as after ten."""
    costs, sizes = [], []
    write_manifest(tmp_path, manifest(100, [0]))  # the first one also makes the folder
    for trained in (10, 1000, 10**12):  # enumerating the last would never end
        before = GroupSet(((0, trained), (trained + 3, trained + 5)))
        late = [trained + 7, trained + 5, trained + 6]

        def commit(before: GroupSet = before, late: list[int] = late) -> None:
            committed = Manifest(
                step=len(sizes), policy_version=0, run_attempt=0, groups=before.union(late)
            )
            path = write_manifest(tmp_path, committed)
            assert read_manifest(path) == committed
            assert late[0] in committed.groups
            sizes.append(path.stat().st_size)

        costs.append(lines_run(commit))
    assert costs[1:] == costs[:1] * 2
    assert sizes[2] - sizes[0] < 60
