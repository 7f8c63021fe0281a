"""The node's host copy of policy weights: one safetensors file per version, on a tmpfs directory.

    directory = WeightsDirectory([shm / "job", run / "weights"], keep=2)
    published = directory.publish(run_attempt, version, model_tensors)       # the trainer
    tensors = directory.load(run_attempt, version)                           # any process of the node
    with directory.borrow(run_attempt, version) as tensors:                  # the same, to copy from at once
        ...

Contract:
* A version is named (run_attempt, version): a job that was rolled back repeats version numbers.
* A version appears at once and complete, or not at all, whenever the publisher dies.
* The newest `keep` versions stay. Opening an older one raises VersionGone.
* `load` copies nothing: the tensors are mapped. They stay valid and unchanged for as long as they live, also when their
  version is deleted. They may be written; a write stays private.
* `borrow` is for whoever copies the tensors into a model: its mapping is kept from version to version, which saves half
  of the copy's time. The tensors are read-only, and hold the version until the block is left.

Variants, named in WeightsPublished:
* "full": every tensor.
* "delta" (of a publisher made with variant="delta"): beside the full file lies what changed since the version published
  before, if that is smaller. `borrow` gives it to a receiver that holds exactly that version; any other gets the full
  state, so one that missed a version skips to the newest. The delta carries a checksum of the full state, which
  `WeightsDelta.apply` verifies.
* "adapter" (`publish(..., base=...)`): some tensors only, such as those of a LoRA adapter, that belong on top of a base
  version. The base is published once and stays, beyond `keep`, while a version that stays names it. `load` and `borrow`
  give the adapter's tensors alone; the receiver loads the base once and merges. An adapter version is whole with
  respect to its base, so versions in between may be missed.

With keep >= 2, publishing writes over the space of the version that leaves, when nobody holds it: fresh pages of tmpfs
cost several times the copy. Whoever holds a file has a shared lock on it, so the publisher knows, and a reader that
dies holds nothing.

Calls block for the time of the copy: call them in the worker thread. Not for use from several nodes.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from channels.errors import BadFrame, ChannelError, VersionGone
from channels.messages import Message
from channels.weights.delta import Comparison, WeightsDelta
from channels.weights.files import Borrowed, Mappings, Space, map_privately
from channels.weights.layout import Layout, lay_out, same_layout

if TYPE_CHECKING:
    import torch

VARIANTS = ("full", "delta")
SPARE_BYTES = 64 * 1024 * 1024  # that a file system must have left after a publish
_NAME = r"(\d{6,})-(\d{10,})"
_FILE = re.compile(rf"(?:weights-{_NAME}|adapter-{_NAME}-on-{_NAME})\.safetensors")
_DELTA = re.compile(rf"delta-{_NAME}-from-{_NAME}\.safetensors")

VersionName = tuple[int, int]  # (run attempt, version)


class WeightsPublished(Message, frozen=True, tag="weights_published"):
    """Publisher to rollout actors of the node: a version can be loaded. Once per version, in order."""

    run_attempt: int
    policy_version: int
    path: str
    size_bytes: int
    variant: str = "full"  # or "delta", "adapter"
    variant_bytes: int = 0  # that a receiver reads which has all that went before
    base: VersionName | None = None  # what a delta or an adapter goes on top of


class _Version(NamedTuple):
    name: VersionName
    path: Path
    base: VersionName | None  # of an adapter


class WeightsDirectory:
    """The versions of one job on one node. One process publishes; any may read.

    paths: directories in order of preference, such as one in /dev/shm and one in the run directory;
    a version goes to the first with room for it. They are made when the first version is published.
    keep: versions that stay.    variant: of VARIANTS, what this process publishes.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        keep: int = 2,
        variant: str = "full",
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep = {keep}, but the newest version always stays: give at least 1")
        if variant not in VARIANTS:
            raise ValueError(f'variant = "{variant}" is none of {", ".join(VARIANTS)}')
        given = (paths,) if isinstance(paths, str | Path) else paths
        self.paths = tuple(Path(path) for path in given)
        if not self.paths:
            raise ValueError("no directory for weights: give at least one path")
        self.keep = keep
        self.variant = variant
        self._written = Mappings(writable=True)
        self._read = Mappings(writable=False)
        self._last: _Version | None = None  # the full version published before

    def publish(
        self,
        run_attempt: int,
        version: int,
        tensors: "Iterable[tuple[str, torch.Tensor]]",
        *,
        base: VersionName | None = None,
    ) -> WeightsPublished:
        """Write a version and delete those beyond `keep`. Replaces a version of the same name.

        tensors: (name, tensor) pairs, on any device, in any layout.    base: of an adapter version.
        Raises ChannelError when no directory has room, VersionGone without the base, ValueError for a tensor that
        safetensors cannot hold.
        """
        name = (run_attempt, version)
        if base is not None:
            self._find(base)
        given = dict(tensors)
        layout = lay_out(given, _metadata(name, base))
        self._delete_abandoned()
        leaving = self._leaving(self.keep - 1, base)
        reused = self._retire(leaving) if self.keep > 1 else None
        with ExitStack() as stack:
            if reused is not None:
                stack.callback(reused.drop)
            before = self._base_of_delta(layout, stack) if base is None else None
            path, delta = self._write(name, base, layout, given, reused, before)
        written = _Version(name, path, base)
        self._delete_others(written)
        delta_bytes = 0
        if delta is not None and self._last is not None:
            delta_bytes = self._write_delta(written, self._last.name, delta)
        variant = "adapter" if base is not None else "delta" if delta_bytes else "full"
        published = WeightsPublished(
            run_attempt=run_attempt,
            policy_version=version,
            path=str(path),
            size_bytes=layout.size_bytes,
            variant=variant,
            variant_bytes=delta_bytes or layout.size_bytes,
            base=base if delta is None or self._last is None else self._last.name,
        )
        if base is None:
            self._last = written
        self._delete_beyond(self.keep)
        self._written.forget_others(self.paths)
        return published

    def newest(self) -> WeightsPublished | None:
        """The newest version there is, by run attempt and then by version; None before the first."""
        for found in sorted(self._versions(), reverse=True):
            try:
                size_bytes = found.path.stat().st_size
            except FileNotFoundError:
                continue
            return WeightsPublished(
                run_attempt=found.name[0],
                policy_version=found.name[1],
                path=str(found.path),
                size_bytes=size_bytes,
                variant="full" if found.base is None else "adapter",
                variant_bytes=size_bytes,
                base=found.base,
            )
        return None

    def load(self, run_attempt: int, version: int) -> "Mapping[str, torch.Tensor]":
        """The tensors of a version by name, mapped. Raises VersionGone, BadFrame for a damaged file."""
        name = (run_attempt, version)
        try:
            return map_privately(self._find(name).path)[1]
        except FileNotFoundError as error:
            raise self._gone(name) from error

    @contextmanager
    def borrow(
        self, run_attempt: int, version: int, held: VersionName | None = None
    ) -> "Iterator[Mapping[str, torch.Tensor] | WeightsDelta]":
        """The tensors of a version, or the delta that leads to it from the version that the receiver holds.

        Raises VersionGone, BadFrame for a damaged file. See the module's contract for what may be done with them.
        """
        name = (run_attempt, version)
        self._read.forget_others(self.paths)
        delta = self._open_delta(name, held) if held is not None else None
        if delta is not None:
            yield delta
            return
        try:
            borrowed = Borrowed(self._find(name).path, self._read)
        except FileNotFoundError as error:
            raise self._gone(name) from error
        with borrowed:
            yield borrowed.tensors

    def clear(self) -> None:
        """Delete every version and what a publisher that died left behind."""
        self._delete_beyond(0)
        for path in self.paths:
            for left in path.glob(".*.partial"):
                left.unlink(missing_ok=True)

    # What is there.

    def _versions(self) -> Iterator[_Version]:
        for path in self.paths:
            for entry in path.glob("*.safetensors"):
                match = _FILE.fullmatch(entry.name)
                if match and match[1]:
                    yield _Version((int(match[1]), int(match[2])), entry, None)
                elif match:
                    name, base = (int(match[3]), int(match[4])), (int(match[5]), int(match[6]))
                    yield _Version(name, entry, base)

    def _deltas(self) -> Iterator[tuple[VersionName, Path]]:
        for path in self.paths:
            for entry in path.glob("delta-*.safetensors"):
                match = _DELTA.fullmatch(entry.name)
                if match:
                    yield (int(match[1]), int(match[2])), entry

    def _find(self, name: VersionName) -> _Version:
        for found in self._versions():
            if found.name == name:
                return found
        raise self._gone(name)

    def _gone(self, name: VersionName) -> VersionGone:
        return VersionGone(
            f"version {name[1]} of run attempt {name[0]} is not in "
            f"{' or '.join(map(str, self.paths))}: it was replaced; load the newest instead"
        )

    def _open_delta(self, name: VersionName, held: VersionName) -> WeightsDelta | None:
        for path in self.paths:
            file = path / f"delta-{_text(name)}-from-{_text(held)}.safetensors"
            try:
                layout, tensors = map_privately(file)
            except FileNotFoundError:
                continue
            checksum = layout.metadata.get("checksum")
            if checksum is None:
                raise BadFrame(f"{file} has no checksum")
            return WeightsDelta.of_tensors(tensors, checksum)
        return None

    # What goes.

    def _leaving(self, keep: int, base: VersionName | None = None) -> list[_Version]:
        """Versions beyond `keep`, newest first, that no version which stays is based on."""
        ordered = sorted(self._versions(), reverse=True)
        bases = {base, *(found.base for found in ordered[:keep])}
        return [found for found in ordered[keep:] if found.name not in bases]

    def _delete_abandoned(self) -> None:
        """Delete what publishers that died were writing: nobody holds its lock any more."""
        for path in self.paths:
            for left in path.glob(".*.partial"):
                space = Space.take(left)
                if space is not None:
                    space.drop()

    def _delete_beyond(self, keep: int) -> None:
        for found in self._leaving(keep):
            found.path.unlink(missing_ok=True)  # who holds it keeps it until done
        stay = {found.name for found in self._versions()}
        for name, path in self._deltas():
            if name not in stay:
                path.unlink(missing_ok=True)

    def _delete_others(self, written: _Version) -> None:
        """Delete what had the name of a version that was published again."""
        for found in self._versions():
            if found.name == written.name and found.path != written.path:
                found.path.unlink(missing_ok=True)
        for name, path in self._deltas():
            if name == written.name:
                path.unlink(missing_ok=True)

    def _retire(self, leaving: list[_Version]) -> Space | None:
        """Take the oldest version that leaves out of sight, and its space if nobody holds it."""
        if not leaving:
            return None
        space = Space.take(leaving[-1].path)
        if space is None:
            leaving[-1].path.unlink(missing_ok=True)  # who holds it keeps it until done
        return space

    # What comes.

    def _base_of_delta(
        self, layout: Layout, stack: ExitStack
    ) -> "Mapping[str, torch.Tensor] | None":
        """The version published before, to compare with; None if there is to be no delta."""
        if self.variant == "full" or self._last is None:
            return None
        try:
            borrowed = stack.enter_context(Borrowed(self._last.path, self._read))
        except FileNotFoundError:
            return None
        return borrowed.tensors if same_layout(borrowed.layout.places, layout.places) else None

    def _write(
        self,
        name: VersionName,
        base: VersionName | None,
        layout: Layout,
        tensors: "Mapping[str, torch.Tensor]",
        reused: Space | None,
        before: "Mapping[str, torch.Tensor] | None",
    ) -> tuple[Path, WeightsDelta | None]:
        problems = []
        for path in self.paths:
            path.mkdir(parents=True, exist_ok=True)
            here = reused is not None and reused.path.parent == path
            free = _free_bytes(path) + (reused.size_bytes if reused is not None and here else 0)
            if free < layout.size_bytes + SPARE_BYTES:
                problems.append(f"{path} has {free} bytes")
                continue
            space = reused if reused is not None and here else Space.make(path)
            target = path / _file_name(name, base)
            try:
                delta = self._fill(space, layout, tensors, before)
                space.become(target)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                problems.append(f"{path} ran full")
                continue
            finally:
                space.drop()
            return target, delta
        raise ChannelError(
            f"no room for {layout.size_bytes} bytes of weights: {', '.join(problems)}; "
            "free space there, or keep fewer versions"
        )

    def _fill(
        self,
        space: Space,
        layout: Layout,
        tensors: "Mapping[str, torch.Tensor]",
        before: "Mapping[str, torch.Tensor] | None",
    ) -> WeightsDelta | None:
        """Copy the tensors into the file, comparing them with the version before if there is one."""
        written = space.hold(layout, self._written)
        comparison = Comparison(layout.size_bytes) if before is not None else None
        for name in layout.places:  # the order of the file
            written[name].copy_(tensors[name].detach())
            if comparison is not None and before is not None:
                comparison.add(name, written[name], before[name])
        if comparison is None or not comparison.worthwhile:
            return None
        return comparison.delta(written)

    def _write_delta(self, version: _Version, base: VersionName, delta: WeightsDelta) -> int:
        """Put the delta beside its version; its size. 0 when there is no room: it is not needed."""
        metadata = {**_metadata(version.name, base), "checksum": delta.checksum}
        tensors = delta.tensors()
        layout = lay_out(tensors, metadata)
        directory = version.path.parent
        if _free_bytes(directory) < layout.size_bytes + SPARE_BYTES:
            return 0
        space = Space.make(directory, ".delta")
        try:
            written = space.hold(layout, Mappings(writable=True))
            for name, tensor in tensors.items():
                written[name].copy_(tensor)
            space.become(directory / f"delta-{_text(version.name)}-from-{_text(base)}.safetensors")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return 0
        finally:
            space.drop()
        return layout.size_bytes


def _text(name: VersionName) -> str:
    return f"{name[0]:06d}-{name[1]:010d}"


def _file_name(name: VersionName, base: VersionName | None) -> str:
    if base is None:
        return f"weights-{_text(name)}.safetensors"
    return f"adapter-{_text(name)}-on-{_text(base)}.safetensors"


def _metadata(name: VersionName, base: VersionName | None) -> dict[str, str]:
    metadata = {"run_attempt": str(name[0]), "policy_version": str(name[1])}
    if base is not None:
        metadata |= {"base_run_attempt": str(base[0]), "base_policy_version": str(base[1])}
    return metadata


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
