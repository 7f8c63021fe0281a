"""Which class each kind of actor is; flowd and the processes it starts find actors through this table only."""

from importlib import import_module
from typing import Any

ACTORS = {
    "conductor": "actors.conductor.actor:ConductorActor",
    "env": "actors.env.actor:EnvActor",
    "rollout": "actors.rollout.actor:RolloutActor",
    "inference": "actors.inference.actor:InferenceActor",
    "trainer": "actors.trainer.actor:TrainerActor",
}

# Who talks to whom: flowd introduces exactly these pairs to each other.
PEERS: dict[str, frozenset[str]] = {
    "conductor": frozenset({"env", "rollout", "inference", "trainer"}),
    "env": frozenset({"conductor", "rollout", "inference", "trainer"}),
    "rollout": frozenset({"conductor", "env", "trainer"}),
    "inference": frozenset({"conductor", "env", "trainer"}),
    "trainer": frozenset({"conductor", "env", "rollout", "inference", "trainer"}),
}


def actor_class(kind: str) -> Any:
    """The class that implements a kind; importing it loads what the kind computes with."""
    module, _, name = ACTORS[kind].partition(":")
    return getattr(import_module(module), name)
