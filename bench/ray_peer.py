"""What the benches compare with, done by Ray: calls of an actor, and tensors through its object store.

A process of its own, see `bench.peers`: Ray starts threads and daemons, which are idle while others are measured.
Lines: `call COUNT` (median microseconds), `pipelined COUNT WINDOW` (calls per second), `tensor BYTES COUNT` (median
seconds from `put` of a torch tensor to the answer of an actor that has looked at each page of it).
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import ray
import torch

from bench.peers import ready

PAGE_FLOATS = 1024
STORE_BYTES = 512 << 20


class Adder:
    """Answers at once."""

    def add(self, value: int) -> int:
        return value + 1

    def touch(self, tensor: Any) -> float:
        return float(tensor[::PAGE_FLOATS].sum())


def call(adder: Any, count: str) -> float:
    times = []
    for number in range(int(count)):
        start = time.perf_counter()
        ray.get(adder.add.remote(number))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def pipelined(adder: Any, count: str, window: str) -> float:
    start = time.perf_counter()
    for _ in range(int(count) // int(window)):
        ray.get([adder.add.remote(number) for number in range(int(window))])
    return int(count) // int(window) * int(window) / (time.perf_counter() - start)


def tensor(adder: Any, size_bytes: str, count: str) -> float:
    data = torch.arange(int(size_bytes) // 4, dtype=torch.float32) % 97
    expected = float(data[::PAGE_FLOATS].sum())
    times = []
    for _ in range(int(count)):
        start = time.perf_counter()
        answer = ray.get(adder.touch.remote(ray.put(data)))
        times.append(time.perf_counter() - start)
        assert answer == expected, (answer, expected)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--role", choices=["driver"])
    parser.parse_args()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=STORE_BYTES,
    )
    adder = ray.remote(Adder).remote()
    call(adder, "100")
    ready()
    answers = {"call": call, "pipelined": pipelined, "tensor": tensor}
    for line in sys.stdin:
        what, *arguments = line.split()
        print(json.dumps(answers[what](adder, *arguments)), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
