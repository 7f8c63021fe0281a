"""What observations and actions of a simulator look like: shapes, dtypes and bounds as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArraySpace:
    """Arrays of one shape and dtype. An integer space of shape () is a discrete choice.

    dtype: its NumPy name, such as "float32" or "uint8"
    low, high: bounds, both included; numbers, or arrays of `shape`; infinite where there is none

    ValueError: no such dtype, or bounds that do not fit it.
    """

    shape: tuple[int, ...]
    dtype: str
    low: float | NDArray[Any] = -np.inf
    high: float | NDArray[Any] = np.inf

    def __post_init__(self) -> None:
        try:
            np.dtype(self.dtype)
        except TypeError as error:
            raise ValueError(f'dtype = "{self.dtype}": NumPy has no such dtype') from error
        for name in ("low", "high"):
            bound = np.asarray(getattr(self, name))
            if bound.shape not in ((), self.shape):
                raise ValueError(
                    f"{name} of shape {list(bound.shape)}: give a number, or an array of shape {list(self.shape)}"
                )
        if np.any(np.asarray(self.low) > np.asarray(self.high)):
            raise ValueError(f"low = {self.low} is above high = {self.high}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ArraySpace):
            return NotImplemented
        return (self.shape, np.dtype(self.dtype)) == (other.shape, np.dtype(other.dtype)) and all(
            np.array_equal(np.broadcast_to(ours, self.shape), np.broadcast_to(theirs, self.shape))
            for ours, theirs in ((self.low, other.low), (self.high, other.high))
        )

    def __hash__(self) -> int:
        return hash((self.shape, np.dtype(self.dtype)))

    @property
    def num_choices(self) -> int | None:
        """How many values a discrete choice has; None where the space is no discrete choice."""
        if self.shape or np.dtype(self.dtype).kind not in "iu" or not np.isfinite(self.high):
            return None
        return int(self.high) - int(self.low) + 1

    def sample(self, draw: np.random.Generator) -> NDArray[Any]:
        """A random member: uniform between finite bounds, normal around the finite one or 0 elsewhere."""
        low, high = (np.broadcast_to(bound, self.shape) for bound in (self.low, self.high))
        if np.dtype(self.dtype).kind in "iub":
            return np.asarray(
                draw.integers(low.astype(np.int64), high.astype(np.int64) + 1)
            ).astype(self.dtype)
        bounded = np.isfinite(low) & np.isfinite(high)
        uniform = draw.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0))
        normal = np.clip(draw.normal(size=self.shape), low, high)
        return np.asarray(np.where(bounded, uniform, normal)).astype(self.dtype)

    def complaint(self, value: Any) -> str:
        """Why a value is no member; empty when it is one. NaN is in no space."""
        if not isinstance(value, np.ndarray | np.generic):
            return f"{type(value).__name__} instead of a NumPy array"
        if value.shape != self.shape or value.dtype != np.dtype(self.dtype):
            return f"{value.dtype}{list(value.shape)} instead of {self.dtype}{list(self.shape)}"
        inside = np.greater_equal(value, self.low) & np.less_equal(value, self.high)
        if np.all(inside):
            return ""
        place = tuple(int(i) for i in np.argwhere(~np.atleast_1d(inside))[0])
        low, high = (
            np.atleast_1d(np.broadcast_to(bound, self.shape))[place]
            for bound in (self.low, self.high)
        )
        return f"{np.atleast_1d(value)[place]} at {list(place)}, outside of [{low}, {high}]"


@dataclass(frozen=True, slots=True)
class TextSpace:
    """A text, such as the instruction of a robot's task."""

    def complaint(self, value: Any) -> str:
        """Why a value is no member; empty when it is one."""
        return "" if isinstance(value, str) else f"{type(value).__name__} instead of a text"


Space = ArraySpace | TextSpace
ObservationSpace = Mapping[str, Space]


def observation_complaint(space: ObservationSpace, observation: Any) -> str:
    """Why an observation is not in a space; empty when it is."""
    if not isinstance(observation, Mapping):
        return f"{type(observation).__name__} instead of named arrays"
    if observation.keys() != space.keys():
        return f"names {sorted(observation)} instead of {sorted(space)}"
    for name, part in space.items():
        if complaint := part.complaint(observation[name]):
            return f"{name!r} is {complaint}"
    return ""
