"""Mean and deviation of everything seen so far, as buffers of a model: part of its weights and its checkpoint."""

import torch
from torch import Tensor, nn

LEAST_STD = 1e-4  # a dimension that never changes is not blown up


class RunningMoments(nn.Module):
    """Before anything was seen the mean is 0 and the deviation 1. size: numbers in a row

    Counts, sums and sums of squares add up over batches and ranks, in float64. They are taken about the mean of what
    was seen before, so that after the first batch a large mean costs no digits (Chan, Golub, LeVeque 1983,
    doi:10.1080/00031305.1983.10483115).
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))

    @property
    def std(self) -> Tensor:
        """float64 [size]"""
        variance = self.squares / self.count.clamp(min=1.0)
        return torch.where(self.count > 1, variance.sqrt().clamp(min=LEAST_STD), 1.0)

    def normalize(self, rows: Tensor) -> Tensor:
        """rows: [batch, size]. Returns float32, within 10 deviations."""
        return ((rows.double() - self.mean) / self.std).clamp(-10.0, 10.0).float()

    def moments(self, rows: Tensor) -> Tensor:
        """Count, sum and sum of squares about the present mean, to be summed over ranks. rows: [batch, size]
        Returns float64 [1 + 2 * size]."""
        apart = rows.double() - self.mean
        count = torch.tensor([float(len(rows))], dtype=torch.float64, device=rows.device)
        return torch.cat([count, apart.sum(0), apart.square().sum(0)])

    @torch.no_grad()
    def add(self, moments: Tensor) -> None:
        """moments: as `moments` gives them, with the present mean."""
        size = len(self.mean)
        count, shift, squares = moments[0], moments[1 : 1 + size], moments[1 + size :]
        if not count:
            return
        mean = shift / count  # of the new rows, about the old mean
        total = self.count + count
        # What is new about its own mean, and the distance between the two means.
        self.squares += squares - count * mean.square() + mean.square() * self.count * count / total
        self.mean += mean * count / total
        self.count.copy_(total)
