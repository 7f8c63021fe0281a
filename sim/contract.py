"""The contract between an env actor and whatever episodes come from: a text task, a tool sandbox, a simulator.

An environment hosts up to `num_slots` episodes at once; a slot is an index in `range(num_slots)`. Calls are
synchronous and batched over slots, run in the env actor's worker thread, and never touch the network or the policy.

    observations = env.reset(slots, seeds)          # starts an episode in each slot
    results = env.step(slots, actions)              # one StepResult per slot, in the order given

* Same seed, same first observation, and with the same actions the same trajectory, whatever the slot and
  whatever else runs beside it. Members of one group are reset with one seed.
* `terminated`: the episode ended by its own rules; its value after this step is zero.
  `truncated`: it was cut (step limit); bootstrapping needs `observation`, the true last one. Never both.
* There is no autoreset: a slot whose episode ended takes no `step` until it is reset.
* What is returned is never changed later by the environment (no aliasing of buffers).

A simulator or any other environment with arrays (`ArrayEnvironment`) also says what they look like:

* An observation is a dict of named NumPy arrays and texts, as `observation_space` has it: "state" where there is one
  vector, images `[H, W, 3]` uint8, "instruction" for a text. A discrete action is an integer array of shape ().
* An action is one array of `action_space`. Policies act in chunks: `[chunk, *action_space.shape]` of at least one step.
  `sim.chunks` runs a chunk's steps on any environment and ends at the episode's end.
* `info` has `success_once` (1.0 once any step was a success) and `success_at_end` (1.0 while the last step is one)
  in every result, where the task knows what success is.

Seeds are random numbers. An environment that goes through a finite set, and so has to know how many were drawn before,
says `counted_seeds = True` (a class attribute) and gets counted ones: the group's index, and above it bits
that are the same for the whole job and another job seed changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # checking a job loads this module, and needs no arrays
    import numpy as np
    from numpy.typing import NDArray

    from sim.spaces import ArraySpace, ObservationSpace

INDEX_BITS = 32  # of a counted seed


def counted_seed(key: int, index: int) -> int:
    """The counted seed of an index, under a key of any size."""
    return (key % (1 << 63 - INDEX_BITS) << INDEX_BITS) | index % (1 << INDEX_BITS)


def split_counted_seed(seed: int) -> tuple[int, int]:
    """(key, index) of a counted seed."""
    return divmod(seed, 1 << INDEX_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a conversation. role: "system", "user", "assistant" or "tool"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextObservation:
    """What a text task shows a policy: the messages that are new since the policy's last turn."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step of one episode gave.

    observation: what the policy sees next; also given at the end of an episode (the true last observation).
    reward: of the step; for an action chunk the sum of `step_rewards`
    info: numbers and short strings for logs, such as {"correct": 1.0, "answer": "12"}.
    step_rewards: float32 [steps], of the steps of an action chunk that were run: all of them, or as many as the
        episode still had. `terminated` and `truncated` are those of the last of them; None for a single step.
    """

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, float | str] = field(default_factory=dict)
    step_rewards: "NDArray[np.float32] | None" = None


class Environment(Protocol):
    """Hosts episodes in slots; see the module docstring for the rules."""

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[Any]:
        """Start an episode in each slot. seeds: [n] integers in [0, 2**63). Returns n observations."""
        ...

    def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[StepResult]:
        """Apply one action per slot: text (str) for text tasks, arrays for robots. Returns n results."""
        ...

    def close(self) -> None:
        """Free what the environment holds. Called once; no call follows."""
        ...


class ArrayEnvironment(Environment, Protocol):
    """An environment whose observations and actions are arrays."""

    observation_space: "ObservationSpace"
    action_space: "ArraySpace"

    def render(self, slots: Sequence[int]) -> "list[NDArray[np.uint8]]":
        """A picture of each slot for videos: uint8 [H, W, 3]. SimError: it has no picture to show."""
        ...
