"""How long until an actor answers: forked from the zygote, and as a cold Python process.

    python -m bench.start --json

Both run the same entry with the same imports (torch and transformers' Qwen2). The clock runs from the
order to start until the actor's reply to our answer to its first message is here, over ZeroMQ ipc.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import zmq

from flowd.processes import DEFAULT_PRELOAD, ZygoteClient

ANSWER_DEADLINE_MS = 120_000
COLD_OVER_FORKED_BAR = 20.0
ACTOR_READY_BAR_MS = 50.0
PACKAGES = ("flowd", "torch", "transformers", "pyzmq", "uvloop", "numpy")

Result = dict[str, Any]


def ready_actor(argument: dict[str, str]) -> None:
    """The actor: import what a rollout or trainer actor computes with, say so, confirm the answer."""
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

    context = zmq.Context()
    mailbox = context.socket(zmq.DEALER)
    mailbox.connect(argument["address"])
    mailbox.send_multipart(
        [b"ready", torch.__version__.encode(), Qwen2ForCausalLM.__name__.encode()]
    )
    mailbox.recv()
    mailbox.send_multipart([b"answered"])
    mailbox.close()
    context.term()


class Mailbox:
    """Our end: waits for one actor to say it is ready, answers, waits for its confirmation."""

    def __init__(self, folder: Path) -> None:
        self.address = f"ipc://{folder}/mailbox"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.rcvtimeo = ANSWER_DEADLINE_MS
        self._socket.bind(self.address)

    def meet(self) -> None:
        """Raises zmq.Again when no actor comes within the deadline."""
        actor, said, *_ = self._socket.recv_multipart()
        assert said == b"ready", said
        self._socket.send_multipart([actor, b"welcome"])
        same_actor, said = self._socket.recv_multipart()
        assert (same_actor, said) == (actor, b"answered"), said

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


async def forked(folder: Path, samples: int, warmup: int) -> Result:
    """Actors from a zygote that has torch and transformers imported, one after another, then at once."""
    mailbox = Mailbox(folder)
    client = ZygoteClient()
    log_path = folder / "actors.log"

    async def start_one() -> tuple[float, int]:
        started = time.perf_counter()
        handle = await client.spawn(
            "bench.start:ready_actor",
            {"address": mailbox.address},
            name="bench",
            log_path=log_path,
            environment={"FLOWD_TORCH_THREADS": "1"},
        )
        await asyncio.to_thread(mailbox.meet)
        milliseconds = (time.perf_counter() - started) * 1e3
        await handle.exited
        return milliseconds, handle.pid

    started = time.perf_counter()
    await client.start(folder / "state", preload=(*DEFAULT_PRELOAD, "bench.start"))
    zygote_ready_s = time.perf_counter() - started
    try:
        for _ in range(warmup):
            await start_one()
        times_ms = [(await start_one())[0] for _ in range(samples)]
        memory = psutil.Process(client.pid).memory_info().rss
    finally:
        await client.stop()
        mailbox.close()
    return {
        "actor_ready_ms_p50": statistics.median(times_ms),
        "actor_ready_ms_p90": statistics.quantiles(times_ms, n=10)[-1],
        "actor_ready_ms_min": min(times_ms),
        "actor_ready_samples": samples,
        "zygote_ready_s": zygote_ready_s,
        "zygote_rss_mb": memory / 1e6,
        "zygote_warnings": client.warnings,
    }


async def cold(folder: Path, samples: int, warmup: int) -> Result:
    """The same entry in a fresh interpreter each time; files are in the page cache."""
    mailbox = Mailbox(folder)
    argument = json.dumps({"address": mailbox.address}).encode()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start_one() -> float:
        with tempfile.TemporaryFile() as file:
            file.write(argument)
            file.seek(0)
            command = [
                sys.executable,
                "-m",
                "flowd.actor_exec",
                "--entry",
                "bench.start:ready_actor",
            ]
            command += ["--argument-is-json", "--argument-fd", str(file.fileno())]
            started = time.perf_counter()
            with subprocess.Popen(command, pass_fds=[file.fileno()], env=environment) as process:
                mailbox.meet()
                milliseconds = (time.perf_counter() - started) * 1e3
                if process.wait() != 0:
                    raise RuntimeError(f"the cold actor exited with {process.returncode}")
        return milliseconds

    try:
        for _ in range(warmup):
            await asyncio.to_thread(start_one)
        times_ms = [await asyncio.to_thread(start_one) for _ in range(samples)]
    finally:
        mailbox.close()
    return {"cold_actor_ready_ms_p50": statistics.median(times_ms), "cold_samples": samples}


async def actor_ready(folder: Path, options: argparse.Namespace) -> Result:
    """Forked and cold in the same run, and how much faster the one is."""
    result = await forked(folder, options.samples, warmup=3)
    result |= await cold(folder, options.cold_samples, warmup=1)
    ratio = result["cold_actor_ready_ms_p50"] / result["actor_ready_ms_p50"]
    reached = result["actor_ready_ms_p50"] <= ACTOR_READY_BAR_MS and ratio >= COLD_OVER_FORKED_BAR
    return result | {"cold_over_forked": ratio, "actor_ready_bar_reached": reached}


MEASUREMENTS: list[Callable[[Path, argparse.Namespace], Awaitable[Result]]] = [actor_ready]
"""Each gets a folder of its own and the options; their results are merged."""


def surroundings() -> Result:
    """Hardware and versions that the numbers hold for."""
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "hardware": {
            "cpu": model.partition(":")[2].strip() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "kernel": platform.release(),
            "load_1min": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


async def measure(options: argparse.Namespace) -> Result:
    """All measurements, one after another."""
    result: Result = {}
    for measurement in MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
            result |= await measurement(Path(folder), options)
    return result | surroundings()


def main() -> int:
    """Exit code 0 when the bar is reached, 1 otherwise."""
    parser = argparse.ArgumentParser(description="time from the order to an actor that answers")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--samples", type=int, default=40, help="forked actors (at least 20)")
    parser.add_argument("--cold-samples", type=int, default=5, help="cold processes (at least 3)")
    options = parser.parse_args()
    if options.samples < 20 or options.cold_samples < 3:
        parser.error("too few samples for a median: at least --samples 20 and --cold-samples 3")
    result = asyncio.run(measure(options))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:28} {value:.1f}" if isinstance(value, float) else f"{key:28} {value}")
    return 0 if result["actor_ready_bar_reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
