"""A flowd for a bench: started for it, spoken to as a user would, stopped at the end. And where numbers come from."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import psutil

CONFIG = "configs/arithmetic_grpo.toml"
PACKAGES = ("flowd", "torch", "transformers", "pyzmq", "uvloop", "numpy")
MODULES = {"flowd": "flowd", "flowctl": "flowd.flowctl"}
POLL_S = 0.05


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """What `--set` takes, of keys and values."""
    return [f"{key}={json.dumps(value)}" for key, value in changes.items()]


class Flowd:
    """A flowd of its own, stopped at the end."""

    def __init__(self, root: Path, devices: str) -> None:
        self.root = root
        self.devices = devices

    def __enter__(self) -> Self:
        self.call("flowd", "up", "--detach", "--devices", self.devices)
        return self

    def __exit__(self, *_: object) -> None:
        self.call("flowd", "down")

    def call(self, program: str, *words: str) -> str:
        """Run one of our programs, return its stdout. Raises RuntimeError with its stderr when it fails."""
        command = [sys.executable, "-m", MODULES[program], *words, "--state-dir", str(self.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stderr[-3000:]}")
        return done.stdout

    def submit(self, name: str, changes: Mapping[str, Any], config: str = CONFIG) -> None:
        """Start a job: the demo's, or that of another file, with changes."""
        words = [
            word for each in overrides({"job.name": name, **changes}) for word in ("--set", each)
        ]
        self.call("flowctl", "submit", config, *words)

    def wait(self, name: str) -> None:
        """Follow a job to its end."""
        self.call("flowctl", "status", name, "--follow")

    def status(self, name: str) -> dict[str, Any]:
        """What `flowctl status` says."""
        status: dict[str, Any] = json.loads(self.call("flowctl", "status", name, "--json"))
        return status

    def wait_step(self, name: str, step: int, deadline_s: float = 240.0) -> None:
        """Until the job has trained this many steps: from the size of its metrics, which costs it nothing."""
        until = time.monotonic() + deadline_s
        path = self._metrics_path(name)
        while not path.exists() or path.read_bytes().count(b"\n") < step:
            if time.monotonic() > until:
                raise RuntimeError(f"{name} did not reach step {step}: {self.status(name)}")
            time.sleep(POLL_S)

    def _metrics_path(self, name: str) -> Path:
        return self.root / "runs" / name / "metrics.jsonl"

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self._metrics_path(name)
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]


def surroundings() -> dict[str, Any]:
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
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
    }


class MachineLoad:
    """How much of the machine others took while a bench ran: numbers are only as good as it was idle."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._before = psutil.cpu_times()

    def report(self) -> dict[str, float]:
        """Load averages (1 minute) at start and end; steal and idle as shares of all CPU time in between."""
        now = psutil.cpu_times()
        spent = {name: getattr(now, name) - getattr(self._before, name) for name in now._fields}
        # Guests are counted as user time as well.
        total = sum(v for k, v in spent.items() if not k.startswith("guest")) or 1.0
        return {
            "load_1min_at_start": round(self._load, 2),
            "load_1min_at_end": round(os.getloadavg()[0], 2),
            "steal_fraction": round(spent.get("steal", 0.0) / total, 4),
            "idle_fraction": round(spent["idle"] / total, 4),
        }


def tell(figures: Mapping[str, Any], *, as_json: bool) -> int:
    """Print figures, as JSON or a line each. Returns the exit code: 1 where `bar_reached` is false."""
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        width = max(map(len, figures))
        for key, value in figures.items():
            print(
                f"{key:{width}} {value:.3f}"
                if isinstance(value, float)
                else f"{key:{width}} {value}"
            )
    return 0 if figures["bar_reached"] else 1


def _version(package: str) -> str:
    """Of an installed package; a checkout that only lies on the path has none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
