"""The demo's job on GPUs: what it learns, how fast it samples, what moving a device costs.

    python -m bench.gpu --json

On one GPU: collocated, and disaggregated on two slots of it. On two or more: disaggregated on whole GPUs, collocated on
both while `flowctl scale` gives the trainer the second one, and a move of a slot from rollout to trainer. A model of 0.36 B
parameters shows sizes that matter. Every job runs through a real flowd.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

CONFIG = "configs/arithmetic_grpo.toml"
SKIP_STEPS = 10  # first kernels, allocator, caches
LARGE = {
    "model.hidden_size": 896,
    "model.num_layers": 24,
    "model.num_heads": 14,
    "model.intermediate_size": 4864,
    "model.initializer_range": 0.02,
    "rollout.dtype": "bfloat16",
    "rollout.max_new_tokens": 128,
    "rollout.max_context_tokens": 256,
    "trainer.dtype": "bfloat16",
    "trainer.learning_rate": 1e-6,
    "warmup.steps": 0,
    "guards.constant_reward_steps": 0,
    "checkpoint.every_steps": 100,
    "job.steps": 15,
}


class Flowd:
    """A flowd of its own, stopped at the end."""

    def __init__(self, root: Path, devices: str) -> None:
        self.root = root
        self.devices = devices

    def __enter__(self) -> "Flowd":
        self.call("flowd", "up", "--detach", "--devices", self.devices)
        return self

    def __exit__(self, *_: object) -> None:
        self.call("flowd", "down")

    def call(self, program: str, *words: str, check: bool = True) -> str:
        """Run one of our programs, return its stdout."""
        module = {"flowd": "flowd", "flowctl": "flowd.flowctl"}[program]
        command = [sys.executable, "-m", module, *words, "--state-dir", str(self.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr[-3000:]}")
        return done.stdout

    def submit(self, name: str, changes: dict[str, Any]) -> None:
        """Start a job."""
        words = [w for k, v in {"job.name": name, **changes}.items() for w in ("--set", f"{k}={v}")]
        self.call("flowctl", "submit", CONFIG, *words)

    def wait(self, name: str) -> None:
        """Follow a job to its end."""
        self.call("flowctl", "status", name, "--follow")

    def wait_step(self, name: str, step: int, deadline_s: float = 240.0) -> None:
        """Until the job has trained a step: from its status stream."""
        until = time.monotonic() + deadline_s
        while len(self.metrics(name)) < step:
            if time.monotonic() > until:
                raise RuntimeError(
                    f"{name} did not reach step {step}: {self.call('flowctl', 'status', name)}"
                )
            time.sleep(0.1)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.root / "runs" / name / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def summary(self, name: str, began: float) -> dict[str, Any]:
        """Reward and rates of a job that ended."""
        lines = self.metrics(name)
        steady = lines[min(SKIP_STEPS, len(lines) // 2) :]
        audit = json.loads(self.call("flowctl", "audit", name, "--json"))
        return {
            "steps": len(lines),
            "reward_first": statistics.fmean(x["reward_mean"] for x in lines[:3]),
            "reward_last": statistics.fmean(x["reward_mean"] for x in lines[-5:]),
            "seconds_total": round(time.time() - began, 1),
            "step_seconds_p50": statistics.median(x["seconds"] for x in steady),
            "samples_per_s_p50": statistics.median(x["samples"] / x["seconds"] for x in steady),
            "tokens_per_s_p50": statistics.median(x["tokens_per_s"] for x in steady),
            "kl_sampler_max": max(x["kl_sampler"] for x in lines),
            "staleness_max": max(x["staleness_max"] for x in lines),
            "audit_ok": audit["ok"],
        }

    def run(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        """A job from submit to end."""
        began = time.time()
        self.submit(name, changes)
        self.wait(name)
        return self.summary(name, began)

    def run_scaled(self, name: str, changes: dict[str, Any], *scales: list[str]) -> dict[str, Any]:
        """A job during which devices move."""
        began = time.time()
        self.submit(name, changes)
        self.wait_step(name, SKIP_STEPS)
        moves = []
        for words in scales:
            before = len(self.metrics(name))
            answer = self.call("flowctl", "scale", *words, "--job", name, "--wait", "--json")
            moves.append({"scale": " ".join(words), **json.loads(answer)})
            self.wait_step(name, before + 5)
        self.wait(name)
        return {**self.summary(name, began), "moves": moves}


def one_gpu(root: Path) -> dict[str, Any]:
    """What a single GPU can show."""
    results = {}
    with Flowd(root / "one", "0") as flowd:
        # Collocated, one rollout replica and the trainer take turns on the GPU.
        turns = {"job.mode": "collocated", "rollout.devices": 1, "job.max_staleness": 0}
        results["collocated"] = flowd.run("collocated", turns)
        results["collocated_large"] = flowd.run("collocated-large", {**turns, **LARGE})
    with Flowd(root / "slots", "0,0") as flowd:
        apart = {"rollout.devices": 1}
        results["disaggregated_slots"] = flowd.run("slots", apart)
        results["disaggregated_slots_large"] = flowd.run("slots-large", {**apart, **LARGE})
    return results


def two_gpus(root: Path) -> dict[str, Any]:
    """What needs a second one."""
    results = {}
    long = {"job.steps": 400, "job.stop_reward": 2.0}
    with Flowd(root / "two", "auto") as flowd:
        results["disaggregated"] = flowd.run("disaggregated", {"rollout.devices": 1})
        large = {"rollout.devices": 1, **LARGE}
        results["disaggregated_large"] = flowd.run("disaggregated-large", large)
        # The trainer gets the second GPU as well, and gives it back.
        turns = {"job.mode": "collocated", "rollout.devices": 2, "job.max_staleness": 0}
        results["collocated_scaled"] = flowd.run_scaled(
            "collocated-scaled", {**turns, **long}, ["trainer=+1"], ["trainer=-1"]
        )
    with Flowd(root / "halves", "0,0,1,1") as flowd:
        results["moved"] = flowd.run_scaled(
            "moved",
            {"rollout.devices": 3, **long},
            ["trainer=+1", "--from", "rollout"],
            ["rollout=+1", "--from", "trainer"],
        )
        results["moved_large"] = flowd.run_scaled(
            "moved-large",
            {"rollout.devices": 3, **LARGE, "job.steps": 40},
            ["trainer=+1", "--from", "rollout"],
            ["rollout=+1", "--from", "trainer"],
        )
    return results


def main() -> int:
    """Run what the machine has GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--part", choices=["one", "two"], help="default: all that fits")
    args = parser.parse_args()
    count = torch.cuda.device_count()
    if not count:
        print("bench.gpu needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 1
    results: dict[str, Any] = {
        "hardware": [torch.cuda.get_device_name(i) for i in range(count)],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "config": CONFIG,
    }
    with tempfile.TemporaryDirectory(prefix="flowd-gpu-") as root:
        try:
            if args.part != "two":
                results["one_gpu"] = one_gpu(Path(root))
            if count > 1 and args.part != "one":
                results["two_gpus"] = two_gpus(Path(root))
        except RuntimeError as error:
            results["error"] = str(error)
            for log in sorted(Path(root).rglob("*.log")):
                print(f"== {log}\n{log.read_text()[-1500:]}", file=sys.stderr)
    print(json.dumps(results, indent=None if args.json else 2))
    return 1 if "error" in results else 0


if __name__ == "__main__":
    sys.exit(main())
