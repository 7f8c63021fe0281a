"""LIBERO: the tasks of its suites from their published initial states. Loads the package when it is opened.

A seed is counted: the group's index goes through tasks first and initial states second, so the first tasks x trials
indices are the published evaluation, and training sees each pair equally often.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sim.errors import MissingDependency, SimError
from sim.rendering import choose_mujoco_gl
from sim.slots import SimulatorSlots

# Steps after which evaluations of vision-language-action models cut an episode (Kim et al. 2024, OpenVLA, its LIBERO
# evaluation): the longest demonstration, and some.
STEP_LIMITS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
DATA = ("bddl_files", "init_files")  # of the package, beside its code
INSTALL = "make install-robots, or see docs/simulators.md"


class Libero(SimulatorSlots):
    """Episodes of a suite's tasks.

    num_slots: episodes hosted at the same time, each in a simulator of its own (1.5 to 2.2 GB with pictures)
    suite: "libero_spatial", "libero_object", "libero_goal", "libero_10" or "libero_90"
    tasks: indices of the suite's tasks; None is all of them
    max_steps: episodes are truncated after so many; None is the published limit of the suite
    ignore_terminations: success does not end an episode
    settle_steps: steps with an open gripper at the start, in which objects come to rest; they are not counted
    image_size: pixels of a side of both cameras' pictures; 0 renders nothing (of one task only), and is much faster
    path: folder of the assets; None is where the package has them

    Observation: "image" (from the front) and "wrist_image", uint8, rotated by half a turn as the training data of
    vision-language-action models is; "state" float32 [8]: the hand's position, its axis-angle, both fingers; and
    "instruction". Without pictures "objects" float32 [n] instead: all poses. Action: float32 [7] in [-1, 1]: the hand's
    move and turn, and the gripper (-1 opens). Reward 1 at success, else 0. `info` has `task`, its name.

    MissingDependency: the package or its assets are not there. SimError: there is no such suite or task. ValueError:
    an argument breaks a rule.
    """

    counted_seeds = True

    def __init__(
        self,
        num_slots: int,
        suite: str,
        *,
        tasks: Sequence[int] | None = None,
        max_steps: int | None = None,
        ignore_terminations: bool = False,
        settle_steps: int = 10,
        image_size: int = 256,
        path: str | None = None,
    ) -> None:
        if suite not in STEP_LIMITS:
            raise ValueError(f'suite = "{suite}": it is one of {", ".join(STEP_LIMITS)}')
        if image_size < 0 or settle_steps < 0:
            raise ValueError(f"image_size = {image_size}, settle_steps = {settle_steps}: 0 or more")
        choose_mujoco_gl()
        known = _load(suite, path)
        chosen = list(range(len(known.tasks)) if tasks is None else tasks)
        if not chosen or min(chosen) < 0 or max(chosen) >= len(known.tasks):
            raise SimError(
                f"tasks = {chosen}: {suite} has 0 to {len(known.tasks) - 1}; give one or more"
            )
        if not image_size and len(chosen) > 1:
            raise ValueError(
                f"image_size = 0 with {len(chosen)} tasks: their objects differ; give one task"
            )
        limit = STEP_LIMITS[suite] if max_steps is None else max_steps

        def make() -> Any:
            from sim.libero_simulator import LiberoSimulator

            return LiberoSimulator(
                known, chosen, image_size=image_size, settle_steps=settle_steps, max_steps=limit
            )

        super().__init__(make, num_slots, max_steps=limit, ignore_terminations=ignore_terminations)


def _load(suite: str, path: str | None) -> Any:
    """The suite's object of the package."""
    if "libero" not in sys.modules and (path is not None or "LIBERO_CONFIG_PATH" not in os.environ):
        _configure(path)
    try:
        from libero.libero import benchmark, get_libero_path
    except ModuleNotFoundError as error:
        raise MissingDependency(f"LIBERO needs the module {error.name}: {INSTALL}") from error
    assets = Path(get_libero_path("assets"))
    if path is not None and Path(path).resolve() != assets.resolve():
        raise SimError(
            f'path = "{path}", but this process has loaded LIBERO with {assets}: use one folder per process'
        )
    if not (assets / "scenes").is_dir():
        raise MissingDependency(
            f"LIBERO's assets are not in {assets}: set path in [env.args] to their folder, or libero-download-assets"
        )
    with contextlib.redirect_stdout(sys.stderr):  # it tells the order of the tasks
        return benchmark.get_benchmark_dict()[suite]()


def _configure(path: str | None) -> None:
    """Have the package find its files, and its assets in `path`.

    Left to itself it writes a config.yaml with absolute paths into the home directory at its first import, and believes
    it for ever. And most of its modules look for assets beside themselves, whatever that file says. So a folder
    in the cache has the file, and the package with a link to the assets, which is used where they are elsewhere.
    """
    spec = importlib.util.find_spec("libero")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    if not places:
        raise MissingDependency(f"LIBERO needs the module libero: {INSTALL}")
    outer = Path(places[0])
    key = hashlib.sha256(f"{outer}\n{path}".encode()).hexdigest()[:16]
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowd" / f"libero-{key}"
    )
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        _link(outer, made / "libero", folder / "libero", path)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(made)
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    if path is not None:
        sys.path.insert(0, str(folder))


def _link(outer: Path, made: Path, final: Path, path: str | None) -> None:
    """Copy the package's code and link its data into `made`; config.yaml beside it says where they are in the end."""
    inner = made / "libero"
    made.mkdir()
    shutil.copy(outer / "__init__.py", made)
    # Links to code would not do: it asks for the real paths of its files.
    shutil.copytree(
        outer / "libero", inner, ignore=shutil.ignore_patterns("__pycache__", "assets", *DATA)
    )
    for name in DATA:
        (inner / name).symlink_to(outer / "libero" / name)
    (inner / "assets").symlink_to(outer / "libero" / "assets" if path is None else Path(path))
    root = final / "libero"
    config = {
        "benchmark_root": str(root),
        "bddl_files": str(root / "bddl_files"),
        "init_states": str(root / "init_files"),
        "datasets": str(final / "datasets"),
        "assets": str(root / "assets"),
    }
    (made.parent / "config.yaml").write_text(json.dumps(config))  # which is YAML too
