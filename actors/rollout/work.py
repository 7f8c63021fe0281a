"""What a rollout actor holds, and what it asks of whatever finds the actions: tokens by tokens, or all at once."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from actors.episodes import Action, TurnRequest
from actors.randomness import fold
from channels.channel import Item

if TYPE_CHECKING:
    import torch

    from channels.weights.delta import WeightsDelta

KEY_OF_SAMPLE = 2  # purpose of the key that a turn's draws come from


def sample_key(job_seed: int, request: TurnRequest, sample: int) -> int:
    """The key of all draws of one sample in one turn."""
    if request.key is not None:
        return fold(request.key, sample, request.turn)
    return fold(job_seed, KEY_OF_SAMPLE, request.group, sample, request.turn)


@dataclass
class Work:
    """A request while it is held, or several that are answered together.

    state: the sampler's own notes on it, None before it was begun
    """

    item: Item
    order: int
    watch: asyncio.Task[None]  # for its cancellation
    state: Any = field(default=None)

    @property
    def requests(self) -> tuple[TurnRequest, ...]:
        """In the order of their answers."""
        payload: TurnRequest | tuple[TurnRequest, ...] = self.item.payload
        return payload if isinstance(payload, tuple) else (payload,)

    @property
    def request(self) -> TurnRequest:
        """The only one; of several the first, which tells version and sampling of all."""
        return self.requests[0]


@dataclass(frozen=True, slots=True)
class Advanced:
    """started: works that are held by the sampler from now on; finished: those that ended, with their actions."""

    started: list[Work]
    finished: list[tuple[Work, list[Action | None]]]


class Sampler(Protocol):
    """Finds the actions of requests, on a device. Called in the worker thread, one call at a time.

    running: begun and not finished, in order    at_a_time: requests that can run together
    gather_s: an idle device starts once no request has come for so long; 0 takes what is there
    """

    running: list[Work]
    at_a_time: int
    gather_s: float

    @property
    def has_device(self) -> bool:
        """Whether there is anything on the device to give up."""
        ...

    def take_device(self) -> None:
        """Be on the device: built at the first time, as before otherwise."""
        ...

    def offload(self) -> None:
        """Free the device. Nothing runs."""
        ...

    def memory_bytes(self) -> int:
        """Device memory held now."""
        ...

    def load_weights(
        self, version: int, weights: "Mapping[str, torch.Tensor] | WeightsDelta"
    ) -> None:
        """Replace the weights. Raises WeightsMismatch for a delta that does not fit: load others then."""
        ...

    def load_adapter(self, version: int, adapter: "Mapping[str, torch.Tensor]") -> None:
        """Put the job's LoRA adapter on top of the weights that were loaded."""
        ...

    def weights_in_place(self) -> "Mapping[str, torch.Tensor]":
        """See `GenerationEngine.weights_in_place`."""
        ...

    def weights_replaced(self, version: int) -> None:
        """See `GenerationEngine.weights_replaced`."""
        ...

    def advance(self, admissible: Sequence[Work], interrupted: Callable[[], bool]) -> Advanced:
        """Start what fits, in order, and work until a request is finished, `interrupted`, or the time slice is over."""
        ...

    def suspend(self) -> list[Work]:
        """Stop all that runs and return it; begun again, it goes on from where it stood."""
        ...

    def drop(self, work: Work) -> None:
        """Forget one that runs."""
        ...

    def with_progress(self, work: Work) -> TurnRequest | tuple[TurnRequest, ...]:
        """The payload of one that does not run, with what was made of it: whoever takes it goes on from there."""
        ...
