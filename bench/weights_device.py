"""How long do new weights take from a trainer's GPU into a rollout replica's tensors, on the same and on another GPU?

    python -m bench.weights --device cuda --json

Qwen2-shaped, bfloat16. A publisher and a receiver, each a process of its own; a round lasts from the call of `publish`
until the receiver has acknowledged the last bucket. Beside each, in the same round, a bare copy of the same tensors
within one process (`Tensor.copy_`, one after the other, to the same GPU as the receiver's). The bars are 20 ms on one
GPU and 40 ms between two. With several GPUs bench/weights_fsdp.py follows: from two ranks' shards to two replicas.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch

from bench.qwen2 import SIZES, copy, make_state, randomize
from channels.messages import decode, encode
from channels.tensors.devices import CudaDevice, Device
from channels.weights.delta import checksum
from channels.weights.device import (
    BUCKET_BYTES,
    DevicePublisher,
    DeviceReceiver,
    WeightsBucket,
    WeightsBucketTaken,
)

WARM_UP = 3
AT_MOST_MS = {"same_gpu": 20.0, "other_gpu": 40.0}
CHECKSUM = (
    b"="  # no message begins so; the receiver answers with it and the checksum of its tensors
)


def make_device(name: str) -> Device:
    """The GPU of a name as torch has it."""
    torch.cuda.set_device(name)
    return CudaDevice(torch.device(name).index)


def receive(address: str, device_name: str, size: str) -> None:
    """The receiver's process: until the other end closes."""
    device = make_device(device_name)
    state = make_state(size, device_name)
    receiver = DeviceReceiver(device, state)
    with Client(address) as connection:
        while True:
            try:
                data = connection.recv_bytes()
            except EOFError:
                receiver.close()
                return
            if data == CHECKSUM:
                connection.send_bytes(CHECKSUM + checksum(state).encode())
                continue
            bucket = decode(data)
            assert isinstance(bucket, WeightsBucket)
            receiver.take(bucket)
            connection.send_bytes(encode(bucket.taken()))


class Pair:
    """A publisher here, its receiver in a process of its own."""

    def __init__(self, size: str, here: str, there: str, bucket_bytes: int) -> None:
        self.device = make_device(here)
        self.state = make_state(size, here)
        self.near = make_state(size, there)  # of the bare copies
        self.there = there
        self.publisher = DevicePublisher(
            self.device, lambda _, bucket: self.connection.send_bytes(encode(bucket)), bucket_bytes
        )
        with tempfile.TemporaryDirectory(prefix="flowd-bench-") as directory:
            address = str(Path(directory) / "socket")
            with Listener(address) as listener:
                command = [sys.executable, "-m", "bench.weights_device", address, there, size]
                self.process = subprocess.Popen(command)
                self.connection: Connection = listener.accept()
        self.answers: list[bytes] = []
        self.answered = threading.Event()
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()
        self.publisher.add_receiver(there)

    def _listen(self) -> None:
        while True:
            try:
                data = self.connection.recv_bytes()
            except (EOFError, OSError):
                self.publisher.remove_receiver(self.there)
                self.answered.set()
                return
            if data.startswith(CHECKSUM):
                self.answers.append(data)
                self.answered.set()
                continue
            message = decode(data)
            assert isinstance(message, WeightsBucketTaken)
            self.publisher.taken(self.there, message)

    def round(self, version: int) -> tuple[float, float]:
        """Seconds of the update, and of the bare copy."""
        randomize(self.state, version)
        self._settle()
        began = time.perf_counter()
        if self.publisher.publish(0, version, self.state.items()) != [self.there]:
            raise RuntimeError("the receiver ended; its error is above")
        updated = time.perf_counter() - began
        self._settle()
        began = time.perf_counter()
        copy(self.near, self.state)
        self._settle()
        return updated, time.perf_counter() - began

    def _settle(self) -> None:
        for name in {str(self.device.device), self.there}:
            if name.startswith("cuda"):
                torch.cuda.synchronize(name)

    def check(self) -> None:
        """Raises RuntimeError unless both hold the same bits."""
        self.connection.send_bytes(CHECKSUM)
        self.answered.wait()
        if self.answers != [CHECKSUM + checksum(self.state).encode()]:
            raise RuntimeError("the receiver holds other bits than the publisher")

    def close(self) -> None:
        """End the receiver, give the memory back."""
        self.process.terminate()
        self.process.wait()
        self.listener.join()
        self.publisher.close()


def measure(size: str, here: str, there: str, rounds: int, bucket_bytes: int) -> dict[str, Any]:
    """Milliseconds of an update, medians over rounds."""
    pair = Pair(size, here, there, bucket_bytes)
    try:
        began = time.perf_counter()
        pair.round(0)
        first = time.perf_counter() - began  # opens the pool, enables peer access
        taken = [pair.round(number) for number in range(1, WARM_UP + rounds)][WARM_UP - 1 :]
        pair.check()
        size_bytes = sum(tensor.nbytes for tensor in pair.state.values())
    finally:
        pair.close()
    updates, bare = (sorted(values) for values in zip(*taken, strict=True))
    median = statistics.median(updates)
    return {
        "weights_ms": round(median * 1e3, 3),
        "weights_gb_per_s": round(size_bytes / median / 1e9, 1),
        "bare_weights_ms": round(statistics.median(bare) * 1e3, 3),
        "weights_ms_all": [round(value * 1e3, 3) for value in updates],
        "first_round_ms": round(first * 1e3, 1),
        "size_bytes": size_bytes,
        "bucket_bytes": bucket_bytes,
    }


def report(size: str, rounds: int) -> dict[str, Any]:
    """Same GPU, and another one if there is one. Raises SystemExit without any."""
    count = torch.cuda.device_count()
    if not count:
        raise SystemExit("bench.weights --device cuda needs an NVIDIA GPU, and torch sees none")
    results: dict[str, Any] = {
        "hardware": [torch.cuda.get_device_name(i) for i in range(count)],
        "torch": torch.__version__,
        "model": f"Qwen2 {size}, bfloat16",
        "rounds": rounds,
        "same_gpu": measure(size, "cuda:0", "cuda:0", rounds, BUCKET_BYTES),
    }
    if count > 1:
        results["other_gpu"] = measure(size, "cuda:0", "cuda:1", rounds, BUCKET_BYTES)
        # In a module of its own, which builds on this one.
        from bench import weights_fsdp

        first = weights_fsdp.RANKS if count >= weights_fsdp.RANKS + weights_fsdp.RECEIVERS else 0
        results["fsdp"] = weights_fsdp.measure(
            size,
            rounds,
            [f"cuda:{i}" for i in range(weights_fsdp.RANKS)],
            [f"cuda:{first + i}" for i in range(weights_fsdp.RECEIVERS)],
        )
    results["bar_reached"] = results.get("fsdp", {"bar_reached": True})["bar_reached"] and all(
        results[name]["weights_ms"] <= bar for name, bar in AT_MOST_MS.items() if name in results
    )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("device")
    parser.add_argument("size", choices=list(SIZES))
    args = parser.parse_args()
    receive(args.address, args.device, args.size)
