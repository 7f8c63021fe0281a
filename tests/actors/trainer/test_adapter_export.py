"""What is written of a job that trains an adapter: the two merged, either alone."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from actor_stage import TINY, job_config
from transformers import AutoModelForCausalLM

from actors.algorithms import registry
from actors.backends.hf_trainer import HFTrainingEngine
from actors.backends.reference_file import save_reference
from actors.conductor.manifest import Manifest
from actors.errors import BadCheckpoint
from actors.job_config import JobConfig
from actors.models.config import LoraConfig
from actors.models.loading import build_model, save_pretrained_folder
from actors.trainer.checkpoint import CheckpointWriter
from actors.trainer.config import CheckpointConfig
from actors.trainer.export import ExportRequest, export

peft = pytest.importorskip("peft", reason="needs the extra `lora`")
TOKENS = torch.arange(8, 24)[None]


def commit(run_dir: Path, config: JobConfig) -> None:
    """Step 1 of a run whose adapter changes something, on a model of its own where it has no folder."""
    model, _ = build_model(config.model, seed=config.job.seed)
    if config.model.path is None:
        with torch.no_grad():
            model.model.norm.weight += 0.1  # as a warm-up changes it
    engine = HFTrainingEngine(
        model,
        algorithm=registry.find("grpo"),
        algorithm_config=config.algorithm,
        config=config.trainer,
        lora=config.model.lora,
        seed=5,
    )
    adapter = engine.adapter()
    for name, tensor in adapter.items():
        if name.endswith("lora_B"):
            tensor.normal_(std=0.1)
    if config.model.path is None:
        save_reference(run_dir, dict(engine.weights()))
    writer = CheckpointWriter(run_dir, CheckpointConfig())
    writer.stage(1, engine.state())
    writer.write()
    writer.commit(Manifest(step=1, policy_version=1, run_attempt=0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("folder", [False, True], ids=["made", "folder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peft_puts_the_adapter_on_its_base_as_the_merged_model_has_it(
    tmp_path: Path, folder: bool, dtype: str
) -> None:
    """The same logits; the merged model is the frozen one as it was computed with, in the adapter's precision."""
    path = tmp_path / "model"
    save_pretrained_folder(*build_model(TINY, seed=3), path)
    lora = LoraConfig(
        rank=2, alpha=6, target_modules=("q_proj", "down_proj") if folder else ("all-linear",)
    )
    model = msgspec.structs.replace(TINY, lora=lora, path=str(path) if folder else None)
    config = job_config(model=model, trainer={"dtype": dtype})
    commit(tmp_path, config)

    def written(part: str) -> Path:
        exported = export(
            ExportRequest(
                config=config, run_dir=str(tmp_path), step=1, folder=str(tmp_path / part), part=part
            )
        )
        assert exported.dtype == "float32"
        return Path(exported.folder)

    folders = {part: written(part) for part in ("policy", "base", "adapter")}
    merged = AutoModelForCausalLM.from_pretrained(folders["policy"])
    base = AutoModelForCausalLM.from_pretrained(folders["base"])
    bare = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, folders["adapter"]))
    torch.testing.assert_close(adapted, logits(merged), rtol=0, atol=1e-5)
    assert (adapted - bare).abs().max() > 1e-2
    named = peft.PeftConfig.from_pretrained(folders["adapter"]).base_model_name_or_path
    assert named == (str(path) if folder else None)
    if folder:
        save_pretrained_folder(*build_model(TINY, seed=4), path)
        with pytest.raises(BadCheckpoint, match="put back"):
            written("again")
