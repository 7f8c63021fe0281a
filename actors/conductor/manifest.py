"""The checkpoint's manifest: the commit point of a job, and the truth about what was trained.

`checkpoints/step-XXXXXXXX/manifest.json` becomes visible by one rename, after the weights beside it
are on disk. It names every group that these weights contain, from the first step on, as ranges
(see `group_set`): a commit costs the same after a million groups as after ten.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec

from actors.conductor.group_set import NO_GROUPS, GroupSet

FILE = "manifest.json"
FORMAT = 2


class ManifestError(Exception):
    """Raised when a manifest on disk is not one, or contradicts its place or itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint contains.

    step: trainer steps done, so that steps 0 to step - 1 are in it; 0 is before the first
    policy_version: of the weights    run_attempt: in which it was committed
    groups: index of every group trained in those steps
    """

    step: int
    policy_version: int
    run_attempt: int
    groups: GroupSet = NO_GROUPS


class _File(msgspec.Struct, frozen=True, kw_only=True):
    format: int
    step: int
    policy_version: int
    run_attempt: int
    groups: tuple[tuple[int, int], ...]


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def write_manifest(run_dir: Path, manifest: Manifest) -> Path:
    """Commit: when this returns the checkpoint counts, also after a power cut. Returns the file.

    The weights beside it have to be on disk before (written and fsynced by whoever wrote them).
    """
    directory = checkpoint_dir(run_dir, manifest.step)
    directory.mkdir(parents=True, exist_ok=True)
    content = _File(
        format=FORMAT,
        step=manifest.step,
        policy_version=manifest.policy_version,
        run_attempt=manifest.run_attempt,
        groups=manifest.groups.ranges,
    )
    path = directory / FILE
    partial = directory / f".{FILE}.partial"
    with open(partial, "wb") as file:
        file.write(msgspec.json.encode(content) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    for folder in (directory, directory.parent, run_dir):
        _sync_directory(folder)  # the names on the way to the file have to last as well
    return path


def read_manifest(path: Path) -> Manifest:
    """Read one manifest. Raises ManifestError if it is not what `write_manifest` writes."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_File)
        groups = GroupSet(content.groups)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, ValueError) as error:
        raise ManifestError(_bad(path, str(error))) from error
    if content.format != FORMAT:
        raise ManifestError(
            f"{path} has format {content.format}, and this version reads {FORMAT}: "
            "use the version that wrote it"
        )
    if path.parent.name != checkpoint_dir(path, content.step).name:
        raise ManifestError(_bad(path, f"it says step {content.step}"))
    return Manifest(
        step=content.step,
        policy_version=content.policy_version,
        run_attempt=content.run_attempt,
        groups=groups,
    )


def newest_manifest(run_dir: Path) -> Manifest | None:
    """The last commit of a run; None before the first. Raises ManifestError if that one is bad.

    Directories without a manifest are checkpoints that were never finished, and do not count.
    """
    steps = committed_steps(run_dir)
    return read_manifest(checkpoint_dir(run_dir, steps[-1]) / FILE) if steps else None


def committed_steps(run_dir: Path) -> list[int]:
    """The steps whose commits are on disk, ascending."""
    found = (run_dir / "checkpoints").glob(f"step-*/{FILE}")
    matches = (re.fullmatch(r"step-(\d{8,})", path.parent.name) for path in found)
    return sorted(int(match[1]) for match in matches if match)


def _bad(path: Path, what: str) -> str:
    return (
        f"{path} is not a sound manifest: {what}; "
        "remove its step's directory to go on from the checkpoint before"
    )


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
