"""The reference policy of a run as a file: written by the trainer before its first commit, read by inference actors.

It outlives every checkpoint, so a run that is resumed finds the reference that it began with. Blocking.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.errors import BadCheckpoint

if TYPE_CHECKING:
    import torch

FILE = "reference.safetensors"


def save_reference(run_dir: Path, parameters: "Mapping[str, torch.Tensor]") -> None:
    """Write the policy's parameters, by their Hugging Face names; the file is there whole or not at all."""
    from safetensors.torch import save_file

    partial = run_dir / f".{FILE}.partial"
    save_file({name: tensor.contiguous() for name, tensor in parameters.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, run_dir / FILE)


def load_reference(run_dir: Path, model: Any) -> None:
    """Put the run's reference into a model of the same kind. Raises BadCheckpoint where that cannot be done."""
    import torch
    from safetensors.torch import load_file

    path = run_dir / FILE
    try:
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        raise BadCheckpoint(
            f"{path} is not the reference policy of this job's [model]: {error}; submit the job anew, as what its KL "
            "is measured from is lost"
        ) from error
