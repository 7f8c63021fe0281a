"""A publisher in a process of its own: does what the lines of stdin say, answers each with a line of JSON.

    python weights_publisher.py DIRECTORY VARIANT

The state after update n depends on n alone, so that whoever tests needs nothing from this process but its files.
"""

import json
import os
import signal
import sys

import numpy as np
import torch

from channels.weights import WeightsDirectory
from channels.weights.delta import as_integers
from channels.weights.files import Space

KEEP = 3
RANK = 2
Tensors = dict[str, torch.Tensor]


def first_state() -> Tensors:
    """Tensors of every size of element, empty and zero-dimensional ones, and one that is not contiguous."""
    random = np.random.default_rng(0)
    floats = torch.from_numpy(random.normal(size=(40, 30)).astype(np.float32))
    return {
        "layer.weight": floats.clone(),
        "layer.half": floats.to(torch.bfloat16).t(),
        "layer.float8": floats.flatten()[:333].to(torch.float8_e4m3fn),
        "layer.double": floats.flatten()[:17].double(),
        "layer.complex": floats.flatten()[:6].to(torch.complex64),
        "mask": floats.flatten()[:99] > 0,
        "scale": torch.tensor(1.5),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }


def update(state: Tensors, number: int) -> None:
    """Random bits (NaNs among them) in random places; now and then everything, or nothing at all."""
    random = np.random.default_rng(number)
    fraction = (0.0, 0.01, 0.05, 1.0)[random.choice(4, p=(0.1, 0.5, 0.35, 0.05))]
    for tensor in state.values():
        integers = as_integers(tensor.contiguous())
        places = np.flatnonzero(random.random(integers.numel()) < fraction)
        bits = random.bytes(places.size * tensor.element_size())
        drawn = torch.from_numpy(np.frombuffer(bits, integers.numpy().dtype).copy())
        integers[torch.from_numpy(places)] = drawn & 1 if tensor.dtype == torch.bool else drawn
        tensor.copy_(integers.view(tensor.dtype).reshape(tensor.shape))


def adapter(number: int) -> Tensors:
    """A LoRA adapter of layer.weight."""
    random = torch.Generator().manual_seed(number)
    return {
        "layer.lora_A": torch.randn(RANK, 30, generator=random),
        "layer.lora_B": torch.randn(40, RANK, generator=random),
    }


def die(*_: object) -> None:
    """Where a version would be shown."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Publish until stdin ends."""
    directory, variant = sys.argv[1:]
    weights = WeightsDirectory(directory, keep=KEEP, variant=variant)
    state, updates = first_state(), 0
    for line in sys.stdin:
        command = json.loads(line)
        while updates < command["version"]:
            updates += 1
            update(state, updates)
        if command.get("die"):
            Space.become = die  # type: ignore[method-assign]
        name = command["run_attempt"], command["version"]
        if command.get("base") is None:
            published = weights.publish(*name, state.items())
        else:
            tensors = adapter(command["version"])
            published = weights.publish(*name, tensors.items(), base=tuple(command["base"]))
        print(json.dumps([published.variant, published.variant_bytes]), flush=True)


if __name__ == "__main__":
    main()
