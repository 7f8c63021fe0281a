"""The [env] section of a job: what episodes come from, and how many env actors host them."""

from typing import Annotated, Any

from msgspec import Meta, field

from actors.config import Section


class EnvConfig(Section, frozen=True, kw_only=True):
    """Env actors: each hosts a simulator or text task and plays whole groups of episodes."""

    task: str
    """A registered task (docs/tasks.md for text, docs/simulators.md for robots) or an import path "module:Class"."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task."""
    actors: Annotated[int, Meta(ge=1)] = 2
    """Env actor processes."""
    groups_per_actor: Annotated[int, Meta(ge=1)] = 16
    """Groups that one env actor plays at the same time."""
    workers: Annotated[int, Meta(ge=0)] = 0
    """Processes of each env actor that host its slots; each answers when it is ready. 0: the actor's own thread."""
    step_timeout_s: Annotated[float, Meta(gt=0)] = 60.0
    """A worker that takes longer for one step of its slots is killed, and its episodes are played again."""
    max_turns: Annotated[int, Meta(ge=1)] | None = None
    """Turns after which an episode is truncated, unless the task ends it before. Left out it is 1 for text, and as many
    as the simulator gives for a policy that acts on arrays."""
    python: str | None = None
    """Another interpreter for this stage; None is flowd's own."""
