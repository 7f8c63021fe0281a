"""Makes what an inference actor computes with. Loads torch; the actor imports it in its worker thread."""

from pathlib import Path
from typing import Any

import torch

from actors.algorithms.config import resolve
from actors.backends.hf_inference import HFInferenceEngine
from actors.backends.reference_file import load_reference
from actors.job_config import JobConfig
from actors.models.loading import build_model
from channels.lifecycle import ActorSpec


def build_engine(spec: ActorSpec, config: JobConfig) -> HFInferenceEngine:
    """What the job asks inference actors for, on the actor's device: the run's reference, a model for each version's
    weights."""
    wanted = config.inference

    def build() -> Any:
        model, _ = build_model(config.model, seed=config.job.seed, dtype=torch.float32)
        return model

    reference = None
    if wanted.gives("reference"):
        reference = build()
        load_reference(Path(spec.run_dir), reference)
    return HFInferenceEngine(
        config=config.trainer,
        device="cuda:0" if spec.devices[0].startswith("cuda") else "cpu",
        reference=reference,
        policy=build() if wanted.reads_policy else None,
        critic=resolve(config.algorithm).critic if wanted.gives("values") else None,
        proximal=wanted.gives("proximal"),
    )
