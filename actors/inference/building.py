"""Makes what an inference actor computes with. Loads torch; the actor imports it in its worker thread."""

from pathlib import Path

import torch

from actors.backends.hf_reference import HFReferenceEngine
from actors.backends.reference_file import load_reference
from actors.job_config import JobConfig
from actors.models.loading import build_model
from channels.lifecycle import ActorSpec


def build_engine(spec: ActorSpec, config: JobConfig) -> HFReferenceEngine:
    """The reference policy of the run, on the actor's device."""
    model, _ = build_model(config.model, seed=config.job.seed, dtype=torch.float32)
    load_reference(Path(spec.run_dir), model)
    return HFReferenceEngine(
        model,
        config=config.trainer,
        device="cuda:0" if spec.devices[0].startswith("cuda") else "cpu",
    )
