"""Makes the policy of a [policy] section, and writes one down. Loads torch."""

from importlib import import_module
from pathlib import Path
from typing import cast

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from actors.models.action_policy import ActionPolicy
from actors.models.config import PolicyConfig

BUILT_IN = {
    "actor_critic": "actors.models.actor_critic:ActorCritic",
    "tokens": "actors.models.token_policy:TokenPolicy",
}

WEIGHTS, CONFIG = "policy.safetensors", "policy.json"  # of a policy's folder


def build_policy(config: PolicyConfig, *, seed: int) -> ActionPolicy:
    """The policy on the CPU in evaluation mode, float32; its weights are those of `config.path`, or drawn from `seed`.

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
    if config.path is not None:
        try:
            policy.load_state_dict(load_file(Path(config.path) / WEIGHTS))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(
                f'[policy] path = "{config.path}" cannot be loaded: {error}; give a folder that `flowctl export` '
                f"wrote, and the numbers of [policy] as its {CONFIG} has them"
            ) from error
    return policy.eval()


def save_policy_folder(policy: ActionPolicy, config: PolicyConfig, folder: Path) -> None:
    """Write a folder that `build_policy` can load: weights with running moments, and the [policy] section as JSON."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in policy.state_dict().items()},
        folder / WEIGHTS,
    )
    plain = msgspec.structs.replace(config, path=None)
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(plain)) + b"\n")
