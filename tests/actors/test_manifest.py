"""The commit point on disk."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.conductor.manifest import (
    FILE,
    Manifest,
    ManifestError,
    checkpoint_dir,
    from_ranges,
    newest_manifest,
    read_manifest,
    to_ranges,
    write_manifest,
)


def manifest(step: int, groups) -> Manifest:
    return Manifest(step=step, policy_version=step, run_attempt=1, groups=frozenset(groups))


@given(st.frozensets(st.integers(0, 200)))
def test_ranges_are_exactly_the_set(groups):
    """Any set comes back, and no two ranges touch."""
    ranges = to_ranges(groups)
    assert from_ranges(ranges) == groups
    assert sum(stop - start for start, stop in ranges) == len(groups)
    assert len(ranges) == sum(group - 1 not in groups for group in groups)


def test_groups_in_order_are_one_range():
    """The usual case stays small: what stands out are the holes."""
    assert to_ranges(range(1000)) == [(0, 1000)]
    assert to_ranges([5, 0, 1, 3]) == [(0, 2), (3, 4), (5, 6)]


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
        ({"format": 7}, "format 7, and this version reads 1"),
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
