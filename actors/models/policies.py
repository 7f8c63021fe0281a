"""Makes the policy of a [policy] section. Loads torch."""

from importlib import import_module
from typing import cast

import torch

from actors.models.action_policy import ActionPolicy
from actors.models.config import PolicyConfig

BUILT_IN = {
    "actor_critic": "actors.models.actor_critic:ActorCritic",
    "tokens": "actors.models.token_policy:TokenPolicy",
}


def build_policy(config: PolicyConfig, *, seed: int) -> ActionPolicy:
    """The policy on the CPU in evaluation mode, float32; its weights are drawn from `seed` alone.

    A kind that is an import path names a class that takes the PolicyConfig. Raises ValueError where it cannot be had.
    """
    path = BUILT_IN.get(config.kind, config.kind)
    module, _, name = path.partition(":")
    try:
        made = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f'[policy] kind = "{config.kind}" cannot be imported: {error}; built in are {", ".join(BUILT_IN)}'
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = cast(ActionPolicy, made(config))
    return policy.eval()
