"""How fast do new weights reach two receivers, against three processes that do nothing but these copies?

    python -m bench.weights --json
    python -m bench.weights --device cuda --json

A state dict with the names and shapes of a 0.5B Qwen2 in bfloat16. Every round, of `full`, `bare` and `delta` in turn,
lasts from the call of `publish` until both receivers have the version in tensors of their own; gigabytes are those of
the model, also for `delta`, where `--changed` of the elements differ. `bare`: the publisher copies each tensor into a
shared mapping that all three touched before, the receivers copy it out; no file, no lock, no version.

At the end the receivers' tensors are compared with the publisher's by checksum. `--device cuda` is about weights that
never leave the GPUs: see bench/weights_device.py.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.local import MachineLoad, surroundings
from bench.qwen2 import SIZES, change, copy, make_state, randomize
from channels.weights import WeightsDirectory
from channels.weights.delta import WeightsDelta, checksum
from channels.weights.layout import lay_out, views

RECEIVERS = 2
KINDS = ("full", "bare", "delta")


def map_bare(path: Path, size_bytes: int) -> mmap.mmap:
    """The mapping of the bare copies, faulted in."""
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


class Receiver:
    """One that gets the weights: a process of its own."""

    def __init__(self, directory: Path, size: str) -> None:
        command = [sys.executable, "-m", "bench.weights", "--receive", str(directory)]
        self.process = subprocess.Popen(
            [*command, "--size", size], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a receiver ended; its error is above")
        return json.loads(line)

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it


def receive(directory: Path, size: str) -> None:
    """A receiver's process: does what the lines of stdin say, answers each."""
    torch.set_num_threads(1)
    state = make_state(size)
    layout = lay_out(state, {})
    bare = views(map_bare(directory / "bare", layout.size_bytes), layout.places)
    weights = {kind: WeightsDirectory(directory / kind) for kind in ("full", "delta")}
    held = dict.fromkeys(weights, (-1, -1))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, version = json.loads(line)
        if kind == "checksum":
            print(json.dumps(checksum(state)), flush=True)
            continue
        if kind == "bare":
            copy(state, bare)
        else:
            with weights[kind].borrow(0, version, held[kind]) as found:
                if isinstance(found, WeightsDelta):
                    found.apply(state)
                else:
                    copy(state, found)
            held[kind] = (0, version)
        print(json.dumps("done"), flush=True)


class Publisher:
    """The other process: times rounds of each kind."""

    def __init__(self, directory: Path, size: str, receivers: list[Receiver]) -> None:
        self.receivers = receivers
        self.state = make_state(size)
        randomize(self.state, 0)
        layout = lay_out(self.state, {})
        self.bare = views(map_bare(directory / "bare", layout.size_bytes), layout.places)
        self.weights = {
            "full": WeightsDirectory(directory / "full"),
            "delta": WeightsDirectory(directory / "delta", variant="delta"),
        }
        self.version = 0
        self.variant_bytes: dict[str, int] = {}
        self.seconds_publish: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def round(self, kind: str) -> float:
        """Seconds until both receivers have what `state` is now."""
        self.version += 1
        began = time.perf_counter()
        if kind == "bare":
            copy(self.bare, self.state)
        else:
            published = self.weights[kind].publish(0, self.version, self.state.items())
            self.variant_bytes[kind] = published.variant_bytes
        self.seconds_publish[kind].append(time.perf_counter() - began)
        for receiver in self.receivers:
            receiver.tell(kind, self.version)
        for receiver in self.receivers:
            receiver.answer()
        return time.perf_counter() - began

    def check(self) -> None:
        """Raises RuntimeError unless all hold the same bits."""
        wanted = checksum(self.state)
        for receiver in self.receivers:
            receiver.tell("checksum", 0)
        if {receiver.answer() for receiver in self.receivers} != {wanted}:
            raise RuntimeError("a receiver holds other bits than the publisher")


def measure(size: str, rounds: int, changed: float) -> Iterator[tuple[str, Any]]:
    """All figures, medians over rounds."""
    size_bytes = lay_out(make_state(size), {}).size_bytes
    shm = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="flowd-bench-weights-", dir=shm))
    try:
        with (directory / "bare").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        with ExitStack() as stack:
            receivers = [stack.enter_context(Receiver(directory, size)) for _ in range(RECEIVERS)]
            publisher = Publisher(directory, size, receivers)
            for receiver in receivers:
                receiver.answer()
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            # A delta goes on top of what its receivers got from its own directory: its rounds come last.
            for kinds in (("full", "bare"), ("delta",)):
                for number in range(-3, rounds):  # 3 to warm up: first pages of all files
                    for kind in kinds:
                        change(publisher.state, changed, publisher.version)
                        taken = publisher.round(kind)
                        if number >= 0:
                            seconds[kind].append(taken)
                        if number in (0, rounds - 1):
                            publisher.check()
            median = {kind: statistics.median(seconds[kind]) for kind in KINDS}
            full, bare = size_bytes / median["full"] / 1e9, size_bytes / median["bare"] / 1e9
            yield "size_bytes", size_bytes
            yield "weights_gb_per_s", round(full, 3)
            yield "bare_weights_gb_per_s", round(bare, 3)
            yield "ratio", round(full / bare, 3)
            yield "delta_weights_gb_per_s", round(size_bytes / median["delta"] / 1e9, 3)
            yield "delta_bytes", publisher.variant_bytes["delta"]
            for kind in KINDS:
                publishing = statistics.median(publisher.seconds_publish[kind][3:])
                yield f"{kind}_seconds", [round(value, 4) for value in sorted(seconds[kind])]
                yield f"{kind}_publish_seconds_p50", round(publishing, 4)
    finally:
        shutil.rmtree(directory)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--changed", type=float, default=0.01, help="fraction, between versions")
    parser.add_argument("--receive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda":
        from bench.weights_device import report

        print(json.dumps(report(args.size or "1.5b", args.rounds), indent=None if args.json else 2))
        return 0
    size = args.size or "0.5b"
    if args.receive is not None:
        receive(args.receive, size)
        return 0
    torch.set_num_threads(1)
    load = MachineLoad()
    results: dict[str, Any] = {
        **surroundings(),
        "model": f"Qwen2 {size}, bfloat16",
        "receivers": RECEIVERS,
        "rounds": args.rounds,
        "changed_fraction": args.changed,
        **dict(measure(size, args.rounds, args.changed)),
        "load": load.report(),
    }
    print(json.dumps(results, indent=None if args.json else 2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
