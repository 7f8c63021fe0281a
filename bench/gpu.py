"""The demo's job on GPUs: what it learns, how fast it samples, what moving a device costs.

    python -m bench.gpu --json

On one GPU: collocated, and disaggregated on two slots of it. On two or more: disaggregated on whole GPUs, collocated
on both while `flowctl scale` gives the trainer the second one, and a move of a slot from rollout to trainer. A model of
0.36 B parameters shows sizes that matter. Every job runs through a real flowd.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.local import CONFIG, Flowd

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


class Runs(Flowd):
    """A flowd, and what its jobs gave."""

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

    def run_scaled(
        self, name: str, changes: dict[str, Any], *scales: list[str], steps_between: int = 20
    ) -> dict[str, Any]:
        """A job during which devices move; cancelled some steps after the last move."""
        began = time.time()
        self.submit(name, changes)
        self.wait_step(name, min(SKIP_STEPS, steps_between))
        moves = []
        for words in scales:
            before = len(self.metrics(name))
            answer = self.call("flowctl", "scale", *words, "--job", name, "--wait", "--json")
            moves.append({"scale": " ".join(words), **json.loads(answer)})
            self.wait_step(name, before + steps_between)
        self.call("flowctl", "cancel", name)
        return {**self.summary(name, began), "moves": moves}


def one_gpu(root: Path, results: dict[str, Any]) -> None:
    """What a single GPU can show."""
    with Runs(root / "one", "0") as flowd:
        # Collocated, one rollout replica and the trainer take turns on the GPU.
        turns = {"job.mode": "collocated", "rollout.devices": 1, "job.max_staleness": 0}
        results["collocated"] = flowd.run("collocated", turns)
        results["collocated_large"] = flowd.run("collocated-large", {**turns, **LARGE})
    with Runs(root / "slots", "0,0") as flowd:
        apart = {"rollout.devices": 1}
        results["disaggregated_slots"] = flowd.run("slots", apart)
        results["disaggregated_slots_large"] = flowd.run("slots-large", {**apart, **LARGE})


def two_gpus(root: Path, results: dict[str, Any]) -> None:
    """What needs a second one."""
    long = {"job.steps": 5000, "job.stop_reward": 2.0}  # cancelled after the moves
    with Runs(root / "two", "auto") as flowd:
        results["disaggregated"] = flowd.run("disaggregated", {"rollout.devices": 1})
        large = {"rollout.devices": 1, **LARGE}
        results["disaggregated_large"] = flowd.run("disaggregated-large", large)
        # The trainer gets the second GPU as well, and gives it back.
        turns = {"job.mode": "collocated", "rollout.devices": 2, "job.max_staleness": 0}
        results["collocated_scaled"] = flowd.run_scaled(
            "collocated-scaled", {**turns, **long}, ["trainer=+1"], ["trainer=-1"]
        )
    with Runs(root / "halves", "0,0,1,1") as flowd:
        results["moved"] = flowd.run_scaled(
            "moved",
            {"rollout.devices": 3, **long},
            ["trainer=+1", "--from", "rollout"],
            ["rollout=+1", "--from", "trainer"],
        )
        results["moved_large"] = flowd.run_scaled(
            "moved-large",
            {"rollout.devices": 3, **LARGE, "job.steps": 500},
            ["trainer=+1", "--from", "rollout"],
            ["rollout=+1", "--from", "trainer"],
            steps_between=3,
        )


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
                one_gpu(Path(root), results.setdefault("one_gpu", {}))
            if count > 1 and args.part != "one":
                two_gpus(Path(root), results.setdefault("two_gpus", {}))
        except RuntimeError as error:
            results["error"] = str(error)
            for log in sorted(Path(root).rglob("*.log")):
                print(f"== {log}\n{log.read_text()[-1500:]}", file=sys.stderr)
    print(json.dumps(results, indent=None if args.json else 2))
    return 1 if "error" in results else 0


if __name__ == "__main__":
    sys.exit(main())
