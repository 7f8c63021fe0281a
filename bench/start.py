"""How long until things run: an actor, flowd itself, and two more rollout actors of a running job.

    python -m bench.start --json

actor_ready_ms_*: an actor forked from the zygote; cold_actor_ready_ms_p50: the same as a cold Python process.
    Both run the same entry with the same imports (torch and transformers' Qwen2). The clock runs from the order to
    start until the actor's reply to our answer to its first message is here, over ZeroMQ ipc.
flowd_up_ms: `flowd up --detach` until `flowctl nodes` has answered, both as processes. flowd_first_actors_ms: from
    the same beginning until a job submitted at once has its actors started, so with the zygote's imports.
scale_total_s: what `flowctl scale rollout=+2 --wait` says of the demo's job on eight virtual devices.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import zmq

from bench.local import Flowd, MachineLoad, surroundings
from flowd.processes import DEFAULT_PRELOAD, ZygoteClient

ANSWER_DEADLINE_MS = 120_000
COLD_OVER_FORKED_BAR = 20.0
ACTOR_READY_BAR_MS = 50.0
SCALE_BAR_S = 2.0
SCALE_AFTER_STEPS = 5
FIRST_JOB = {"warmup.steps": 0}
SCALED_JOB = {
    "job.steps": 100_000,  # it is cancelled
    "job.stop_reward": 2.0,
    "warmup.steps": 0,
    "guards.constant_reward_steps": 0,
}

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


async def flowd_up(folder: Path, options: argparse.Namespace) -> Result:
    """From nothing to a daemon that answers, and to a job whose actors are there."""

    def once(number: int) -> tuple[float, float]:
        flowd = Flowd(folder / str(number), "cpu:4")
        began = time.perf_counter()
        with flowd:
            flowd.call("flowctl", "nodes")
            answered = time.perf_counter()
            flowd.submit("first", FIRST_JOB)
            return (answered - began) * 1e3, (time.perf_counter() - began) * 1e3

    await asyncio.to_thread(once, 0)  # the page cache
    times = [await asyncio.to_thread(once, number) for number in range(1, options.ups + 1)]
    answered, started = zip(*times, strict=True)
    return {
        "flowd_up_ms": statistics.median(answered),
        "flowd_up_ms_max": max(answered),
        "flowd_first_actors_ms": statistics.median(started),
        "flowd_up_samples": options.ups,
    }


async def scale(folder: Path, options: argparse.Namespace) -> Result:
    """Two rollout actors more, and away again, while the job trains."""

    def moves() -> list[tuple[Result, Result]]:
        with Flowd(folder, "cpu:8") as flowd:
            flowd.submit("scaled", SCALED_JOB)
            flowd.wait_step("scaled", SCALE_AFTER_STEPS)
            answers = []
            for _ in range(options.scales):
                pair = []
                for change in ("rollout=+2", "rollout=-2"):
                    pair.append(
                        json.loads(flowd.call("flowctl", "scale", change, "--wait", "--json"))
                    )
                    trained = len(flowd.metrics("scaled"))
                    flowd.wait_step("scaled", trained + 2)  # each change meets a job at work
                answers.append((pair[0], pair[1]))
            flowd.call("flowctl", "cancel", "scaled")
            return answers

    answers = await asyncio.to_thread(moves)
    more, fewer = zip(*answers, strict=True)

    def median(results: Sequence[Result], key: str) -> float:
        return statistics.median(float(result[key]) for result in results)

    total = median(more, "seconds_total")
    return {
        "scale_total_s": total,
        "scale_total_s_max": max(result["seconds_total"] for result in more),
        "scale_ready_s": median(more, "seconds_ready"),
        "scale_first_output_s": median(more, "seconds_first_output"),
        "scale_down_total_s": median(fewer, "seconds_total"),
        "scale_samples": options.scales,
        "scale_bar_reached": total < SCALE_BAR_S,
    }


MEASUREMENTS: dict[str, Callable[[Path, argparse.Namespace], Awaitable[Result]]] = {
    "actor": actor_ready,
    "up": flowd_up,
    "scale": scale,
}
"""Each gets a folder of its own and the options; their results are merged."""


async def measure(options: argparse.Namespace) -> Result:
    """What was asked for, one after another."""
    load = MachineLoad()
    result: Result = {}
    for name in options.only or MEASUREMENTS:
        with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
            result |= await MEASUREMENTS[name](Path(folder), options)
    return result | {"load": load.report()} | surroundings()


def main() -> int:
    """Exit code 0 when the bars of what was measured are reached, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--samples", type=int, default=40, help="forked actors (at least 20)")
    parser.add_argument("--cold-samples", type=int, default=5, help="cold processes (at least 3)")
    parser.add_argument("--ups", type=int, default=5, help="starts of flowd (at least 5)")
    parser.add_argument("--scales", type=int, default=5, help="changes of the job (at least 3)")
    parser.add_argument("--only", action="append", choices=list(MEASUREMENTS), help="default: all")
    options = parser.parse_args()
    least = {"samples": 20, "cold_samples": 3, "ups": 5, "scales": 3}
    for name, count in least.items():
        if (given := getattr(options, name)) < count:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} {given} is too few for a median: at least --{flag} {count}")
    result = asyncio.run(measure(options))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:28} {value:.1f}" if isinstance(value, float) else f"{key:28} {value}")
    return 0 if all(value for key, value in result.items() if key.endswith("_bar_reached")) else 1


if __name__ == "__main__":
    sys.exit(main())
