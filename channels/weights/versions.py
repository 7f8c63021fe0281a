"""Which versions lie in the directories of one job's weights, how their files are named, and which of them go."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from channels.errors import VersionGone
from channels.weights.files import Space

VersionName = tuple[int, int]  # (run attempt, version)

_NAME = r"(\d{6,})-(\d{10,})"
_FILE = re.compile(rf"(?:weights-{_NAME}|adapter-{_NAME}-on-{_NAME})\.safetensors")
_DELTA = re.compile(rf"delta-{_NAME}-from-{_NAME}\.safetensors")


class Version(NamedTuple):
    """A file with a version's tensors."""

    name: VersionName
    path: Path
    base: VersionName | None  # of an adapter


class Versions:
    """What is in these directories. Holds nothing: every call looks."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Version]:
        for path in self.paths:
            for entry in path.glob("*.safetensors"):
                match = _FILE.fullmatch(entry.name)
                if match and match[1]:
                    yield Version((int(match[1]), int(match[2])), entry, None)
                elif match:
                    name, base = (int(match[3]), int(match[4])), (int(match[5]), int(match[6]))
                    yield Version(name, entry, base)

    def find(self, name: VersionName) -> Version:
        """The file of a version. Raises VersionGone."""
        for found in self:
            if found.name == name:
                return found
        raise self.gone(name)

    def gone(self, name: VersionName) -> VersionGone:
        """The error that says so."""
        return VersionGone(
            f"version {name[1]} of run attempt {name[0]} is not in "
            f"{' or '.join(map(str, self.paths))}: it was replaced; load the newest instead"
        )

    def delta(self, name: VersionName, held: VersionName) -> Path | None:
        """The file of the changes from one version to another."""
        for path in self.paths:
            file = path / delta_file(name, held)
            if file.exists():
                return file
        return None

    def leaving(self, keep: int, base: VersionName | None = None) -> list[Version]:
        """Versions beyond `keep`, newest first, that neither the next nor one that stays is based on."""
        ordered = sorted(self, reverse=True)
        bases = {base, *(found.base for found in ordered[:keep])}
        return [found for found in ordered[keep:] if found.name not in bases]

    def retire(self, leaving: list[Version]) -> Space | None:
        """Take the oldest version that leaves out of sight, and its space if nobody holds it."""
        if not leaving:
            return None
        space = Space.take(leaving[-1].path)
        if space is None:
            leaving[-1].path.unlink(missing_ok=True)  # who holds it keeps it until done
        return space

    def delete_abandoned(self) -> None:
        """Delete what publishers that died were writing: nobody holds its lock any more."""
        for path in self.paths:
            for left in path.glob(".*.partial"):
                space = Space.take(left)
                if space is not None:
                    space.drop()

    def delete_beyond(self, keep: int) -> None:
        """Delete versions beyond `keep`, and deltas whose version is not there."""
        for found in self.leaving(keep):
            found.path.unlink(missing_ok=True)  # who holds it keeps it until done
        stay = {found.name for found in self}
        for name, path in self._deltas():
            if name not in stay:
                path.unlink(missing_ok=True)

    def delete_others(self, written: Version) -> None:
        """Delete what had the name of a version that was published again."""
        for found in self:
            if found.name == written.name and found.path != written.path:
                found.path.unlink(missing_ok=True)
        for name, path in self._deltas():
            if name == written.name:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete every version and what a publisher that died left behind."""
        self.delete_beyond(0)
        for path in self.paths:
            for left in path.glob(".*.partial"):
                left.unlink(missing_ok=True)

    def _deltas(self) -> Iterator[tuple[VersionName, Path]]:
        for path in self.paths:
            for entry in path.glob("delta-*.safetensors"):
                match = _DELTA.fullmatch(entry.name)
                if match:
                    yield (int(match[1]), int(match[2])), entry


def version_file(name: VersionName, base: VersionName | None) -> str:
    """What the file of a version is called."""
    if base is None:
        return f"weights-{_text(name)}.safetensors"
    return f"adapter-{_text(name)}-on-{_text(base)}.safetensors"


def delta_file(name: VersionName, base: VersionName) -> str:
    """What the file of the changes from `base` on is called."""
    return f"delta-{_text(name)}-from-{_text(base)}.safetensors"


def metadata(name: VersionName, base: VersionName | None) -> dict[str, str]:
    """What a file says of itself."""
    said = {"run_attempt": str(name[0]), "policy_version": str(name[1])}
    if base is not None:
        said |= {"base_run_attempt": str(base[0]), "base_policy_version": str(base[1])}
    return said


def _text(name: VersionName) -> str:
    return f"{name[0]:06d}-{name[1]:010d}"
