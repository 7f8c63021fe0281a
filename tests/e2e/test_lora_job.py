"""A job that trains an adapter: it alone goes to rollouts and into checkpoints; who exports it gets the two merged."""

import json
from pathlib import Path

import pytest
from flowd_process import FAST, Flowd
from safetensors.torch import load_file


@pytest.mark.e2e
def test_lora_job_trains_and_exports_the_merged_model(own_flowd: Flowd, tmp_path: Path) -> None:
    """In two steps from one seed only what has an adapter changes; the sampler agrees with the trainer."""
    options = [
        "job.name=adapted",
        "job.steps=2",
        "env.task=e2e_tasks:Parity",
        "model.lora.rank=2",
        "trainer.learning_rate=0.01",
    ]
    sets = [word for option in options for word in ("--set", option)]
    done = own_flowd.ctl("run", "--inline", str(FAST), *sets)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in own_flowd.run("adapted").metrics.read_text().splitlines()]
    assert all(abs(line["kl_sampler"]) < 1e-2 for line in lines)
    assert {line["weights_variant"] for line in lines} == {"adapter"}
    weights = []
    for step in (0, 2):
        folder = tmp_path / str(step)
        done = own_flowd.ctl("export", "adapted", str(folder), "--step", str(step))
        assert done.returncode == 0, done.stderr
        weights.append(load_file(folder / "model.safetensors"))
    before, after = weights
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.endswith("proj.weight")}
