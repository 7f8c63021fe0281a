"""One kind of weights in the node's host copy: a file a version, which all ranks of the trainer write their parts of.

Blocking: for the worker thread.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from channels.weights import Publication, WeightsDirectory
from channels.weights.sharded import ShardWriter, outline
from channels.weights.versions import VersionName

if TYPE_CHECKING:
    import torch

    Tensors = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class HostWeights:
    """What one rank does about it.

    tensors: those of now, whole or as shards; the masters, converted as they are written
    dtype: that is published; None is the masters' own
    """

    def __init__(
        self,
        directory: WeightsDirectory,
        tensors: "Tensors",
        *,
        dtype: str | None,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.directory = directory
        self._tensors = tensors
        self._dtype = dtype
        self._parts = ShardWriter(rank, num_ranks)

    def begin(
        self, name: VersionName, base: VersionName | None = None
    ) -> "tuple[Publication, dict[str, torch.Tensor]]":
        """The leader: the file of a version, which nobody sees yet, and what it is made of. base: of an adapter"""
        tensors = dict(self._tensors())
        return self.directory.begin(*name, outline(tensors, self._dtype), base=base), tensors

    def write(self, publication: Publication, tensors: "Mapping[str, torch.Tensor]") -> None:
        """The leader: its own parts of what it began."""
        self._parts.write(publication.tensors, tensors)

    def write_file(self, path: Path) -> None:
        """Another rank: its parts, into what the leader has begun."""
        self._parts.write_file(path, dict(self._tensors()))
