"""Observations as a simulator gives them become what a policy reads: one tensor per array, over a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.models.config import PolicyConfig


def stack(
    observations: Sequence[Mapping[str, Any]], config: PolicyConfig, device: str | torch.device
) -> dict[str, Tensor]:
    """[batch, ...] of the arrays that the policy reads; a text as uint8 [batch, length], zero-padded UTF-8, cut off
    where the policy has no room. Raises ValueError for an observation that lacks one."""
    batch: dict[str, Tensor] = {}
    for name, shape in config.observation.items():
        try:
            values = [observation[name] for observation in observations]
        except KeyError as error:
            raise ValueError(
                f"[policy] observation names {name}, which the simulator does not show; "
                f"it has {', '.join(sorted(observations[0]))}"
            ) from error
        if name == config.instruction:
            values = [_letters(value, shape[0]) for value in values]
        batch[name] = torch.from_numpy(np.stack(values)).to(device)
    return batch


def _letters(text: str, length: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    letters = np.zeros(length, dtype=np.uint8)
    encoded = text.encode()[:length]
    letters[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    return letters
