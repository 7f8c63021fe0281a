"""The node's host copy of policy weights: one safetensors file per version, on a tmpfs directory.

    directory = WeightsDirectory([shm / "job", run / "weights"], keep=2)
    published = directory.publish(run_attempt, version, model_tensors)       # the trainer
    tensors = directory.load(run_attempt, version)                           # any process of the node
    with directory.borrow(run_attempt, version) as tensors:                  # the same, to copy from at once
        ...

Several ranks of a trainer write a version together, each its own parts (see `channels.weights.sharded`):

    with directory.begin(run_attempt, version, outline(tensors)) as publication:     # the leader
        ...                                     # every rank: ShardWriter.write_file(publication.path, tensors)
        published = publication.finish()

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from channels.errors import BadFrame, ChannelError
from channels.messages import Message
from channels.weights.delta import Comparison, WeightsDelta
from channels.weights.files import Borrowed, Mappings, Space, map_privately
from channels.weights.layout import Layout, Sized, lay_out, same_layout
from channels.weights.versions import (
    Version,
    VersionName,
    Versions,
    delta_file,
    metadata,
    version_file,
)

if TYPE_CHECKING:
    import torch

VARIANTS = ("full", "delta")
SPARE_BYTES = 64 * 1024 * 1024  # that a file system must have left after a publish


class WeightsPublished(Message, frozen=True, tag="weights_published"):
    """Publisher to rollout actors of the node: a version can be loaded. Once per version, in order."""

    run_attempt: int
    policy_version: int
    path: str
    size_bytes: int
    variant: str = "full"  # or "delta", "adapter"; "cuda_ipc": on the trainer's GPUs, in the host copy a little later
    variant_bytes: int = 0  # that a receiver reads which has all that went before
    base: VersionName | None = None  # what a delta or an adapter goes on top of
    ranks: int = 0  # of the trainer, that have parts of it on their GPUs

    @property
    def version(self) -> VersionName:
        """Its name."""
        return self.run_attempt, self.policy_version


class Publication:
    """A version that is being written: seen by nobody until `finish`, dropped at the end of the block without it.

    path: the file while it is written    tensors: the whole tensors in it, by name
    """

    def __init__(
        self,
        directory: "WeightsDirectory",
        target: Version,
        layout: Layout,
        space: Space,
        tensors: "Mapping[str, torch.Tensor]",
        before: "tuple[VersionName, Mapping[str, torch.Tensor]] | None",
        held: ExitStack,
    ) -> None:
        self.path = space.path
        self.tensors = tensors
        self.layout = layout
        self._directory = directory
        self._target = target
        self._space = space
        self._before = before
        self._comparison = Comparison(layout.size_bytes) if before is not None else None
        self._compared: set[str] = set()
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """Fill one tensor, converting it to the dtype that is published."""
        self.tensors[name].copy_(tensor.detach())
        self._compare(name)  # while it is in the cache

    def finish(self, changes: tuple[VersionName, WeightsDelta] | None = None) -> WeightsPublished:
        """Show the version, complete: every tensor has been written, by whomever.

        changes: a delta that led here, and the version it started from, to be shown beside it
        """
        for name in self.layout.places:
            self._compare(name)
        if self._before is not None and self._comparison is not None:
            if self._comparison.worthwhile:
                changes = self._before[0], self._comparison.delta(self.tensors)
        self._space.become(self._target.path)
        self._held.close()  # the base of the delta may be written over again
        return self._directory.shown(self._target, self.layout, changes)

    def drop(self) -> None:
        """Give the version up, unless it is shown."""
        self._space.drop()
        self._held.close()

    def _compare(self, name: str) -> None:
        if self._comparison is None or self._before is None or name in self._compared:
            return
        self._compared.add(name)
        self._comparison.add(name, self.tensors[name], self._before[1][name])


class WeightsDirectory:
    """The versions of one job on one node. One process publishes, one version at a time; any may read.

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
        self._versions = Versions(self.paths)
        self._written = Mappings(writable=True)
        self._read = Mappings(writable=False)
        self._last: Version | None = None  # the full version published before

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
        given = dict(tensors)
        with self.begin(run_attempt, version, given, base=base) as publication:
            for name in publication.layout.places:  # the order of the file
                publication.write(name, given[name])
            return publication.finish()

    def begin(
        self,
        run_attempt: int,
        version: int,
        outline: Mapping[str, Sized],
        *,
        base: VersionName | None = None,
    ) -> Publication:
        """As `publish`, for tensors that others will write, or parts of them. outline: dtype and shape by name."""
        name = (run_attempt, version)
        if base is not None:
            self._versions.find(base)
        layout = lay_out(outline, metadata(name, base))
        self._versions.delete_abandoned()
        leaving = self._versions.leaving(self.keep - 1, base)
        reused = self._versions.retire(leaving) if self.keep > 1 else None
        with ExitStack() as stack:
            if reused is not None:
                stack.callback(reused.drop)
            before = self._base_of_delta(layout, stack) if base is None else None
            space, tensors = self._make_room(layout, reused)
            target = Version(name, space.path.with_name(version_file(name, base)), base)
            return Publication(self, target, layout, space, tensors, before, stack.pop_all())

    def shown(
        self, written: Version, layout: Layout, changes: tuple[VersionName, WeightsDelta] | None
    ) -> WeightsPublished:
        """A publication is in sight: add its delta, delete what goes."""
        self._versions.delete_others(written)
        base, delta_bytes = written.base, 0
        if changes is not None:
            delta_bytes = self._write_delta(written, *changes)
            base = changes[0] if delta_bytes else None
        published = WeightsPublished(
            run_attempt=written.name[0],
            policy_version=written.name[1],
            path=str(written.path),
            size_bytes=layout.size_bytes,
            variant="adapter" if written.base else "delta" if delta_bytes else "full",
            variant_bytes=delta_bytes or layout.size_bytes,
            base=base,
        )
        if written.base is None:
            self._last = written
        self._versions.delete_beyond(self.keep)
        self._written.forget_others(self.paths)
        return published

    def newest(self, *, full: bool = False) -> WeightsPublished | None:
        """The newest version there is, by run attempt and then by version; None before the first.

        full: adapters do not count
        """
        for found in sorted(self._versions, reverse=True):
            if full and found.base is not None:
                continue
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

    def base_of(self, run_attempt: int, version: int) -> VersionName | None:
        """What an adapter version goes on top of; None of a version that is whole. Raises VersionGone."""
        return self._versions.find((run_attempt, version)).base

    def load(self, run_attempt: int, version: int) -> "Mapping[str, torch.Tensor]":
        """The tensors of a version by name, mapped. Raises VersionGone, BadFrame for a damaged file."""
        name = (run_attempt, version)
        try:
            return map_privately(self._versions.find(name).path)[1]
        except FileNotFoundError as error:
            raise self._versions.gone(name) from error

    @contextmanager
    def borrow(
        self, run_attempt: int, version: int, held: VersionName | None = None
    ) -> "Iterator[Mapping[str, torch.Tensor] | WeightsDelta]":
        """The tensors of a version, or the delta that leads to it from the version that the receiver holds.

        A receiver that needs parts only reads `tensors[name][within(box, whole(shape))]` (channels.weights.shards).
        Raises VersionGone, BadFrame for a damaged file. See the module's contract for what may be done with them.
        """
        name = (run_attempt, version)
        self._read.forget_others(self.paths)
        delta = self._open_delta(name, held) if held is not None else None
        if delta is not None:
            yield delta
            return
        with self.lend(name) as borrowed:
            yield borrowed.tensors

    def lend(self, name: VersionName, held: VersionName | None = None) -> Borrowed:
        """The file itself of a version or, with `held`, of the delta from there: for `with`, as in `borrow`.

        Raises VersionGone, also for a delta that there is not.
        """
        path = self._versions.find(name).path if held is None else self._versions.delta(name, held)
        try:
            if path is not None:
                return Borrowed(path, self._read)
        except FileNotFoundError:
            pass
        raise self._versions.gone(name)

    def has_delta(self, name: VersionName, held: VersionName) -> bool:
        """Whether there are the changes from one version to another."""
        return self._versions.delta(name, held) is not None

    def clear(self) -> None:
        """Delete every version and what a publisher that died left behind."""
        self._versions.clear()

    def _open_delta(self, name: VersionName, held: VersionName) -> WeightsDelta | None:
        file = self._versions.delta(name, held)
        if file is None:
            return None
        try:
            layout, tensors = map_privately(file)
        except FileNotFoundError:
            return None
        checksum = layout.metadata.get("checksum")
        if checksum is None:
            raise BadFrame(f"{file} has no checksum")
        return WeightsDelta.of_tensors(tensors, checksum)

    def _base_of_delta(
        self, layout: Layout, stack: ExitStack
    ) -> "tuple[VersionName, Mapping[str, torch.Tensor]] | None":
        """The version published before, to compare with; None if there is to be no delta."""
        if self.variant == "full" or self._last is None:
            return None
        try:
            borrowed = stack.enter_context(Borrowed(self._last.path, self._read))
        except FileNotFoundError:
            return None
        if not same_layout(borrowed.layout.places, layout.places):
            return None
        return self._last.name, borrowed.tensors

    def _make_room(
        self, layout: Layout, reused: Space | None
    ) -> "tuple[Space, Mapping[str, torch.Tensor]]":
        """A file of this layout in the first directory that has room for it."""
        problems = []
        for path in self.paths:
            path.mkdir(parents=True, exist_ok=True)
            here = reused is not None and reused.path.parent == path
            free = _free_bytes(path) + (reused.size_bytes if reused is not None and here else 0)
            if free < layout.size_bytes + SPARE_BYTES:
                problems.append(f"{path} has {free} bytes")
                continue
            space = reused if reused is not None and here else Space.make(path)
            try:
                return space, space.hold(layout, self._written)
            except OSError as error:
                space.drop()
                if error.errno != errno.ENOSPC:
                    raise
                problems.append(f"{path} ran full")
            except BaseException:
                space.drop()
                raise
        raise ChannelError(
            f"no room for {layout.size_bytes} bytes of weights: {', '.join(problems)}; "
            "free space there, or keep fewer versions"
        )

    def _write_delta(self, version: Version, base: VersionName, delta: WeightsDelta) -> int:
        """Put the delta beside its version; its size. 0 when there is no room: it is not needed."""
        said = {**metadata(version.name, base), "checksum": delta.checksum}
        tensors = delta.tensors()
        layout = lay_out(tensors, said)
        directory = version.path.parent
        if _free_bytes(directory) < layout.size_bytes + SPARE_BYTES:
            return 0
        space = Space.make(directory, ".delta")
        try:
            written = space.hold(layout, Mappings(writable=True))
            for name, tensor in tensors.items():
                written[name].copy_(tensor)
            space.become(directory / delta_file(version.name, base))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return 0
        finally:
            space.drop()
        return layout.size_bytes


def _free_bytes(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
