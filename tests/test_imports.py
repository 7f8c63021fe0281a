"""Imports point one way, and what must start quickly loads nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "channels": set(),
    "sim": set(),
    "actors": {"channels", "sim"},
    "flowd": {"channels", "actors", "sim"},
}
OURS = {*ROOMS, "tests", "bench"}
# What flowd may know of the actors and simulators: their configs, names and errors, their records on disk.
FLOWD_MAY_IMPORT = {
    "actors.registry",
    "actors.errors",
    "actors.job_config",
    "actors.conductor.ledger",
    "actors.conductor.manifest",
    "actors.retention",
    "sim.registry",
    "sim.errors",
}
KINDS = {"conductor", "env", "rollout", "trainer"}
SHARED_OF_KINDS = {
    "actors.conductor.manifest"
}  # the commit point, which trainer and conductor share


def imports_of(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_the_drawn_direction_only(room: str) -> None:
    """`ROOMS` is the arrow table of the house."""
    assert modules(room)
    for path in modules(room):
        for module in imports_of(path):
            top = module.partition(".")[0]
            if top in OURS and top != room:
                assert top in ROOMS[room], f"{path.relative_to(ROOT)} imports {module}"


def test_flowd_knows_only_the_torch_free_parts_of_actors() -> None:
    """Of the actors flowd imports configs, the registry, errors and the ledger."""
    for path in modules("flowd"):
        for module in imports_of(path):
            if module.partition(".")[0] in ("actors", "sim"):
                allowed = module in FLOWD_MAY_IMPORT or module.endswith(".config")
                assert allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_kinds_of_actors_never_import_each_other() -> None:
    """They meet through channels; configs are data and may be read."""
    for kind in KINDS:
        for path in (ROOT / "actors" / kind).rglob("*.py"):
            for module in imports_of(path):
                parts = module.split(".")
                if parts[0] == "actors" and len(parts) > 1 and parts[1] in KINDS - {kind}:
                    allowed = module.endswith(".config") or module in SHARED_OF_KINDS
                    assert allowed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize(
    "module",
    ["flowd.daemon", "flowd.job", "flowd.jobs", "actors.env.actor", "actors.conductor.actor"],
)
def test_torch_free_modules_load_no_torch(module: str) -> None:
    """The daemon, the job file's checks, env actors and the conductor start without torch."""
    code = (
        f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
