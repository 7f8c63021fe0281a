"""What turns an observation into numbers that a policy's head reads: normalised arrays, and a CNN for images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from actors.models.action_policy import Observations
from actors.models.running_moments import RunningMoments

CHANNELS = (32, 64, 64)
KERNELS = (8, 4, 3)
STRIDES = (4, 2, 1)


def is_image(shape: Sequence[int]) -> bool:
    """[height, width, channels]; anything else is numbers."""
    return len(shape) == 3


class StateNormalizer(nn.Module):
    """Puts the arrays that are no images behind one another, normalised if asked for.

    shapes: of one observation, without the batch. `size`: numbers in the result's row.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, normalize: bool) -> None:
        super().__init__()
        self.names = [name for name, shape in shapes.items() if not is_image(shape)]
        self.size = sum(shapes[name][0] for name in self.names)
        self.moments = RunningMoments(self.size) if normalize and self.size else None

    def rows(self, observations: Observations) -> Tensor:
        """float32 [batch, size], as they are"""
        return torch.cat([observations[name].float() for name in self.names], dim=1)

    def forward(self, observations: Observations) -> Tensor:
        rows = self.rows(observations)
        return rows if self.moments is None else self.moments.normalize(rows)


class ImageEncoder(nn.Module):
    """The CNN of Mnih et al. 2015 (doi:10.1038/nature14236, "Model architecture") over all cameras side by side as
    channels, which have one height and width. images: uint8 [batch, height, width, 3] each. Gives [batch, width]."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], width: int) -> None:
        super().__init__()
        self.names = [name for name, shape in shapes.items() if is_image(shape)]
        sides = {tuple(shapes[name][:2]) for name in self.names}
        if len(sides) != 1:
            raise ValueError(
                f"[policy] observation has images of several sizes: {sorted(sides)}; let the simulator give one"
            )
        layers: list[nn.Module] = []
        channels = 3 * len(self.names)
        for out, kernel, stride in zip(CHANNELS, KERNELS, STRIDES, strict=True):
            layers += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        height, across = sides.pop()
        try:
            with torch.no_grad():
                flat = self.convolutions(torch.zeros(1, 3 * len(self.names), height, across)).shape[
                    1
                ]
        except RuntimeError as error:
            raise ValueError(
                f"[policy] observation has images of {height} x {across} pixels, too small for the CNN: "
                "at least 36 x 36"
            ) from error
        self.head = nn.Sequential(nn.Linear(flat, width), nn.ReLU())

    def forward(self, observations: Observations) -> Tensor:
        dtype = next(self.parameters()).dtype
        images = torch.cat([observations[name] for name in self.names], dim=3)
        features: Tensor = self.head(
            self.convolutions(images.permute(0, 3, 1, 2).to(dtype) / 255.0)
        )
        return features
