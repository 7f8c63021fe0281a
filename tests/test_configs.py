"""Every shipped job file loads, says what it is for, and fits its task."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.job_config import JobConfig
from actors.models.config import ModelConfig
from flowd.devices import inventory
from flowd.job import load_job
from flowd.planner import plan
from sim.registry import make

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))
SIMULATED = [path for path in FILES if "\n[policy]\n" in path.read_text()]
ASSETS = Path(__file__).parents[1] / "../shared/data"
ASSETS_OF = {"libero_object_ppo": "libero/assets", "maniskill_carrot_ppo": "maniskill"}
ROW = '{"question": "What is 2 + 2?", "answer": "It is 4.\\n#### 4"}\n'

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
every_text_file = pytest.mark.parametrize(
    "path", [path for path in FILES if path not in SIMULATED], ids=lambda path: path.stem
)
every_simulated_file = pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, Path | str]:
    """What a user brings: a model folder, data files and an interpreter with simulators, by the key that names them."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    data = tmp_path / "rows.jsonl"
    data.write_text(ROW)
    fields = '{question = "question", answer = "answer", solution = "answer"}'
    sources = f'[{{path = "{data}", fields = {fields}}}, {{path = "{data}", name = "b", fields = {fields}}}]'
    return {
        "model.path": model,
        "env.args.path": data,
        "env.args.sources": sources,
        "env.python": sys.executable,
    }


def load(path: Path, stand_ins: dict[str, Path | str]) -> JobConfig:
    """The job as shipped; stand-ins for the paths that it names, and only for those."""
    text = path.read_text()
    section = {
        "model.path": "[model]\npath =",
        "env.args.path": "[env.args]\npath =",
        "env.args.sources": "[[env.args.sources]]\npath =",
        "env.python": '\npython = ".venv-robots/bin/python"\n',
    }
    named = [key for key in stand_ins if section[key] in text]
    return load_job(path, [f"{key}={stand_ins[key]}" for key in named])


@every_file
def test_shipped_file_loads(path: Path, stand_ins: dict[str, Path | str]) -> None:
    """Without a change but for the paths of a user's own model and data."""
    load(path, stand_ins)


@every_file
def test_shipped_file_begins_with_a_comment(path: Path) -> None:
    """Sentences about what it shows, the hardware and the time stand before the first section."""
    before, _, _ = path.read_text().partition("[job]")
    lines = before.splitlines()
    assert lines
    assert all(line.startswith("#") for line in lines)
    comment = " ".join(lines)
    assert "GRPO" in comment or "PPO" in comment
    assert "CPU cores" in comment or "GPU" in comment
    assert "minutes" in comment or "time" in comment


@every_file
def test_shipped_file_is_named_after_its_job(path: Path, stand_ins: dict[str, Path | str]) -> None:
    """The run directory tells which file it came from: purpose, then algorithm."""
    config = load(path, stand_ins)
    assert path.stem == f"{config.job.name}_{config.algorithm.name}"


@every_file
def test_readme_has_a_row_for_the_file(path: Path) -> None:
    """One row of five cells, with a link."""
    readme = (CONFIGS / "README.md").read_text().splitlines()
    (row,) = (line for line in readme if line.startswith(f"| [{path.name}]({path.name}) |"))
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert len(cells) == 5
    assert all(cells)


@every_text_file
def test_shipped_file_fits_its_task(path: Path, stand_ins: dict[str, Path | str]) -> None:
    """The task takes the arguments; its worked episodes fit in the turns that the job allows."""
    config = load(path, stand_ins)
    task: Any = make(config.env.task, num_slots=1, args=config.env.args)
    if hasattr(task, "conversations"):
        games = task.conversations(range(200))
        turns = max(sum(m.role == "assistant" for m in game) for game in games)
        assert turns == config.max_turns
        assert config.env.args["max_guesses"] == config.env.max_turns
    else:
        assert task.examples([0])
        assert config.max_turns == 1
    task.close()


OPEN = """
import sys
from pathlib import Path
from actors.env.arrays import check_fit
from flowd.job import load_job
from sim.errors import MissingDependency
from sim.registry import make

config = load_job(Path(sys.argv[1]), sys.argv[2:])
try:
    env = make(config.env.task, num_slots=1, args=config.env.args)
except MissingDependency as error:
    print(error)
    sys.exit(77)
check_fit(config.policy, env)
"""


@every_simulated_file
def test_shipped_file_fits_its_simulator(path: Path, stand_ins: dict[str, Path | str]) -> None:
    """Observations and actions of [policy] are the simulator's. In a process of its own, as ManiSkill reads one
    folder of assets a process.
    """
    config = load(path, stand_ins)
    overrides = [f"env.python={sys.executable}"] if config.env.python else []
    assets = ASSETS / ASSETS_OF.get(path.stem, ".")
    if path.stem in ASSETS_OF and assets.is_dir():
        overrides.append(f"env.args.path={assets}")
    command = [sys.executable, "-c", OPEN, str(path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr


@every_file
def test_shipped_file_can_be_placed_on_four_devices(
    path: Path, stand_ins: dict[str, Path | str]
) -> None:
    """A machine without a GPU has at least four virtual ones."""
    assert plan(load(path, stand_ins), inventory("cpu:4")).stage("trainer")


def test_gsm8k_takes_the_model_from_the_folder(stand_ins: dict[str, Path | str]) -> None:
    """None of the numbers of a made-up model are written, for they would not be read."""
    config = load(CONFIGS / "gsm8k_grpo.toml", stand_ins)
    assert config.model == ModelConfig(path=str(stand_ins["model.path"]))
