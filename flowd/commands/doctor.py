"""`flowctl doctor`: whether this machine has what flowd needs."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowd.paths import StatePaths

NAME = "doctor"
HELP = "check what flowd needs on this machine"
PACKAGES = ("msgspec", "pyzmq", "uvloop", "numpy", "torch", "transformers", "tensorboard")
MIN_SHARED_MEMORY_BYTES = 1 << 30
MIN_OPEN_FILES = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    from flowd.console import print_json, table
    from flowd.runs import paths_of

    paths = paths_of(args)
    rows = []
    for name, check in CHECKS.items():
        ok, finding = check(paths)
        rows.append({"check": name, "ok": ok, "finding": finding})
    if args.json:
        print_json(rows)
    else:
        print(table(rows, ("check", "ok", "finding")))
    return 0 if all(row["ok"] for row in rows) else 1


def _python(paths: "StatePaths") -> tuple[bool, str]:
    version = ".".join(map(str, sys.version_info[:3]))
    return sys.version_info >= (3, 11), f"{version} at {sys.executable}; 3.11 or later is needed"


def _packages(paths: "StatePaths") -> tuple[bool, str]:
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            absent.append(name)
    text = ", ".join(found)
    return not absent, f"{text}; missing: {', '.join(absent)}: pip install them" if absent else text


def _state_directory(paths: "StatePaths") -> tuple[bool, str]:
    place = next(p for p in (paths.root, *paths.root.parents) if p.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        return False, f"{paths.root}: {place} is not writable for you; choose another --state-dir"
    from flowd.console import size

    return True, f"{paths.root}, {size(shutil.disk_usage(place).free)} free"


def _shared_memory(paths: "StatePaths") -> tuple[bool, str]:
    from flowd.console import size

    folder = Path("/dev/shm")
    if not folder.is_dir():
        return False, f"no {folder}: weights would go through {paths.weights}"
    free = shutil.disk_usage(folder).free
    enough = free >= MIN_SHARED_MEMORY_BYTES
    wanted = f"; at least {size(MIN_SHARED_MEMORY_BYTES)} is wanted (docker: --shm-size)"
    return enough, f"{size(free)} free{'' if enough else wanted}"


def _open_files(paths: "StatePaths") -> tuple[bool, str]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES
    return enough, f"limit {soft} (hard {hard})" + (
        "" if enough else f"; ulimit -n {MIN_OPEN_FILES}"
    )


def _devices(paths: "StatePaths") -> tuple[bool, str]:
    from flowd.devices import inventory, probe_gpus

    found = inventory("auto")
    gpus = [device for device in found if device.kind == "cuda"]
    if gpus:
        return True, ", ".join(f"{device.id} {device.name}" for device in gpus)
    return True, f"no GPU ({probe_gpus().reason or 'none found'}); {len(found)} virtual devices"


def _flowd(paths: "StatePaths") -> tuple[bool, str]:
    from flowd import lockfile

    running = lockfile.holder(paths.lock)
    return True, f"running, pid {running.pid}" if running else "not running; `flowd up` starts it"


CHECKS: dict[str, Callable[["StatePaths"], tuple[bool, str]]] = {
    "python": _python,
    "packages": _packages,
    "state directory": _state_directory,
    "shared memory": _shared_memory,
    "open files": _open_files,
    "devices": _devices,
    "flowd": _flowd,
}
