"""The policy that a run began with, as a file: written by the trainer before its first commit.

Inference actors read it as the reference. Under an adapter it is the frozen model, which checkpoints do not hold, and
the trainer reads it too. It outlives every checkpoint, so a run that is resumed finds what it began with. Blocking.
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


def read_reference(run_dir: Path) -> "dict[str, torch.Tensor]":
    """The policy's parameters by their Hugging Face names, on the host; nothing where the run has no such file.

    Raises BadCheckpoint for one that is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = run_dir / FILE
    try:
        return load_file(path)
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError) as error:
        raise BadCheckpoint(
            f"{path} cannot be read: {error}; submit the job anew, as the model that it began with is lost"
        ) from error


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
