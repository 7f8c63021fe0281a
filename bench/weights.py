"""How fast do new weights reach two receivers, against three processes that do nothing but these copies?

    python -m bench.weights --json
    python -m bench.weights --device cuda --json

A state dict with the names and shapes of a 0.5B Qwen2 in bfloat16. A round lasts from the call of `publish` until both
receivers have the version in tensors of their own. Rounds of `full` and `bare` alternate; those of `delta`, where
`--changed` of the elements differ between two versions, follow. Gigabytes are those of the model, also for `delta`.
`bare`: the publisher copies each tensor into a shared mapping that all three touched before, the receivers copy it out;
no file, no lock, no version. `sharded`: two ranks write a share each, and each receiver reads its half of every matrix,
as tensor-parallel ones do; gigabytes are those of the model here too.

Exit code 0 when weights_gb_per_s is at least 0.85 of bare_weights_gb_per_s, 1 otherwise. In between and at the end the
receivers' tensors are compared with the publisher's by checksum. `--device cuda` is about weights that never leave the
GPUs: see bench/weights_device.py.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.local import MachineLoad, surroundings
from bench.peers import Peer, ready
from bench.qwen2 import SIZES, change, copy, make_state, randomize
from channels.weights import WeightsDirectory
from channels.weights.delta import WeightsDelta, checksum
from channels.weights.layout import lay_out, views
from channels.weights.sharded import ShardWriter
from channels.weights.shards import Box, Cut, shard, whole, within

RECEIVERS = 2
RANKS = 2
KINDS = ("full", "bare", "delta", "sharded")
WARM_UP = 3  # first pages of all files
AT_LEAST = 0.85  # of the bare copies


def map_bare(path: Path, size_bytes: int) -> mmap.mmap:
    """The mapping of the bare copies, faulted in."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def part_of(tensor: torch.Tensor, receiver: int) -> Box:
    """What a tensor-parallel receiver needs of it: its rows of a matrix, all of a vector."""
    cuts = [Cut(axis=0, dim=0)] if tensor.dim() > 1 else []
    return shard(tensor.shape, (RECEIVERS,), cuts)[receiver]


def parts_of(state: Mapping[str, torch.Tensor], receiver: int) -> dict[str, torch.Tensor]:
    """Views of it, by name."""
    return {n: t[within(part_of(t, receiver), whole(t.shape))] for n, t in state.items()}


def write_parts(directory: Path, size: str, changed: str) -> None:
    """The second rank's process: keeps up with the weights, and writes its share of a version."""
    state = make_state(size)
    randomize(state, 0)
    writer = ShardWriter(1, RANKS)
    ready()
    for line in sys.stdin:
        what, given = line.split()
        if what == "change":
            change(state, float(changed), int(given))
        else:
            writer.write_file(Path(given), state)
        print(json.dumps(given), flush=True)


def receive(directory: Path, size: str, number: str) -> None:
    """A receiver's process: copies what the lines of stdin say, answers each."""
    state = make_state(size)
    part = {name: view.clone() for name, view in parts_of(state, int(number)).items()}
    layout = lay_out(state, {})
    bare = views(map_bare(directory / "bare", layout.size_bytes), layout.places)
    weights = {kind: WeightsDirectory(directory / kind) for kind in ("full", "delta", "sharded")}
    held = dict.fromkeys(weights, (-1, -1))
    ready()
    for line in sys.stdin:
        kind, version = line.split()
        if kind == "checksum":
            print(json.dumps([checksum(state), checksum(part)]), flush=True)
            continue
        if kind == "bare":
            copy(state, bare)
        elif kind == "sharded":
            with weights[kind].borrow(0, int(version)) as found:
                assert isinstance(found, Mapping)
                copy(part, parts_of(found, int(number)))
        else:
            with weights[kind].borrow(0, int(version), held[kind]) as found:
                if isinstance(found, WeightsDelta):
                    found.apply(state)
                else:
                    copy(state, found)
            held[kind] = (0, int(version))
        print(json.dumps(version), flush=True)


class Publisher:
    """The other process: times rounds of each kind."""

    def __init__(self, directory: Path, size: str, receivers: list[Peer], rank: Peer) -> None:
        self.receivers = receivers
        self.rank = rank
        self.share = ShardWriter(0, RANKS)
        self.state = make_state(size)
        randomize(self.state, 0)
        layout = lay_out(self.state, {})
        self.bare = views(map_bare(directory / "bare", layout.size_bytes), layout.places)
        self.weights = {
            "full": WeightsDirectory(directory / "full"),
            "delta": WeightsDirectory(directory / "delta", variant="delta"),
            "sharded": WeightsDirectory(directory / "sharded"),
        }
        self.version = 0
        self.delta_bytes = 0
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.seconds_publish: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def round(self, kind: str) -> None:
        """Until both receivers have what `state` is now."""
        self.version += 1
        began = time.perf_counter()
        if kind == "bare":
            copy(self.bare, self.state)
        elif kind == "sharded":
            with self.weights[kind].begin(0, self.version, self.state) as publication:
                self.rank.tell("write", publication.path)
                self.share.write(publication.tensors, self.state)
                self.rank.line()
                publication.finish()
        else:
            published = self.weights[kind].publish(0, self.version, self.state.items())
            self.delta_bytes = published.variant_bytes
        self.seconds_publish[kind].append(time.perf_counter() - began)
        self._ask_all(kind)
        self.seconds[kind].append(time.perf_counter() - began)

    def _ask_all(self, what: str) -> list[Any]:
        """The receivers work at the same time."""
        for receiver in self.receivers:
            receiver.tell(what, self.version)
        return [json.loads(receiver.line()) for receiver in self.receivers]

    def change(self, fraction: float) -> None:
        """Other weights, the same on both ranks."""
        change(self.state, fraction, self.version)
        self.rank.ask("change", self.version)

    def check(self, kind: str) -> None:
        """Raises RuntimeError unless all hold the same bits."""
        for number, (full, part) in enumerate(self._ask_all("checksum")):
            if kind == "sharded":
                right = part == checksum(parts_of(self.state, number))
            else:
                right = full == checksum(self.state)
            if not right:
                raise RuntimeError(f"{kind}: a receiver holds other bits than the publisher")


def measure(size: str, rounds: int, changed: float) -> dict[str, Any]:
    """All figures, medians over rounds."""
    size_bytes = lay_out(make_state(size), {}).size_bytes
    directory = Path(tempfile.mkdtemp(prefix="flowd-bench-weights-", dir="/dev/shm"))
    try:
        with (directory / "bare").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        with ExitStack() as stack:
            receivers = [
                stack.enter_context(Peer("bench.weights", "receive", str(directory), size, str(i)))
                for i in range(RECEIVERS)
            ]
            rank = stack.enter_context(
                Peer("bench.weights", "write_parts", str(directory), size, str(changed))
            )
            publisher = Publisher(directory, size, receivers, rank)
            # A delta goes on top of what its receivers had before: nothing may come in between.
            for kinds in (("full", "bare"), ("sharded",), ("delta",)):
                for number in range(WARM_UP + rounds):
                    for kind in kinds if number % 2 else kinds[::-1]:
                        publisher.change(changed)
                        publisher.round(kind)
                        if number in (WARM_UP, WARM_UP + rounds - 1):
                            publisher.check(kind)
    finally:
        shutil.rmtree(directory)
    figures: dict[str, Any] = {"size_bytes": size_bytes, "delta_bytes": publisher.delta_bytes}
    for kind in KINDS:
        seconds = sorted(publisher.seconds[kind][WARM_UP:])
        publishing = statistics.median(publisher.seconds_publish[kind][WARM_UP:])
        prefix = "" if kind == "full" else f"{kind}_"
        figures |= {
            f"{prefix}weights_gb_per_s": round(size_bytes / statistics.median(seconds) / 1e9, 3),
            f"{prefix}seconds": [round(value, 4) for value in seconds],
            f"{prefix}seconds_publish": round(publishing, 4),
        }
    return figures


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The ratio, and whether it reaches the bar."""
    ratio = figures["weights_gb_per_s"] / figures["bare_weights_gb_per_s"]
    return {**figures, "weights_over_bare": round(ratio, 3), "bar_reached": ratio >= AT_LEAST}


ROLES: dict[str, Callable[[Path, str, str], None]] = {
    "receive": receive,
    "write_parts": write_parts,
}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--size", choices=list(SIZES), help="0.5b, on GPUs 1.5b")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--changed", type=float, default=0.01, help="fraction, between versions")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.role:
        directory, size, given = args.arguments
        ROLES[args.role](Path(directory), size, given)
        return 0
    if args.device == "cuda":
        from bench.weights_device import report

        results = report(args.size or "1.5b", args.rounds)
    else:
        size = args.size or "0.5b"
        load = MachineLoad()
        results = {
            **surroundings(),
            "model": f"Qwen2 {size}, bfloat16",
            "receivers": RECEIVERS,
            "rounds": args.rounds,
            "changed_fraction": args.changed,
            **judged(measure(size, args.rounds, args.changed)),
            "load": load.report(),
        }
    print(json.dumps(results, indent=None if args.json else 2))
    return 0 if results["bar_reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
