"""Writes the policy of a commit as a folder: `python -m actors.trainer.export`, a request on stdin.

Of a language model it is a Hugging Face folder, of a policy that acts on arrays one that [policy] path can name.

A program of its own for the trainer's interpreter, where that is another one. Critic, moments and counters
stay behind; weights are the trainer's masters, in their own dtype or converted to another.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from actors.backends.hf_weights import ModelWeights
from actors.conductor.manifest import FILE, checkpoint_dir, read_manifest
from actors.job_config import JobConfig
from actors.models.config import PolicyConfig
from actors.models.policies import build_policy, save_policy_folder
from actors.trainer.shard_files import Shards, sync

POLICY = "model."
CRITIC = "critic."


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to export where.

    folder: is made, with those above it, or is empty    dtype: a name of torch's; None is the masters' own
    """

    config: JobConfig
    run_dir: str
    step: int
    folder: str
    dtype: str | None = None


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was exported."""

    step: int
    policy_version: int
    folder: str
    dtype: str
    parameters: int
    size_bytes: int


def export(request: ExportRequest) -> Exported:
    """Write the folder; it is there whole or not at all.

    Raises BadCheckpoint, ManifestError, ValueError for a model that cannot be built, OSError of the disk.
    """
    directory = checkpoint_dir(Path(request.run_dir), request.step)
    manifest = read_manifest(directory / FILE)
    shards = Shards(directory)
    masters = {
        name.removeprefix(POLICY): shards[name] for name in shards if name.startswith(POLICY)
    }
    policy = request.config.policy
    if policy is None:
        model, dtype, save = _language_model(request, masters)
    else:
        model, dtype, save = _array_policy(request, policy, masters)
    folder = Path(request.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        save(partial_folder)
        files = sorted(partial_folder.iterdir())
        for path in (*files, partial_folder):
            sync(path)
        size_bytes = sum(path.stat().st_size for path in files)
        os.rename(partial_folder, folder)  # replaces an empty folder, refuses another
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return Exported(
        step=manifest.step,
        policy_version=manifest.policy_version,
        folder=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        size_bytes=size_bytes,
    )


Chosen = tuple[nn.Module, torch.dtype, Callable[[Path], None]]  # the model, and what writes it


def _language_model(request: ExportRequest, masters: Mapping[str, Tensor]) -> Chosen:
    # Here: transformers takes seconds to import, and a policy that acts on arrays needs none of it.
    from actors.models.loading import build_model, save_pretrained_folder

    masters = {name: tensor for name, tensor in masters.items() if not name.startswith(CRITIC)}
    own = next(iter(masters.values())).dtype
    dtype = own if request.dtype is None else getattr(torch, request.dtype)
    model, tokenizer = build_model(request.config.model, seed=request.config.job.seed, dtype=dtype)
    ModelWeights(model, torch.device("cpu")).load(masters)
    return model, dtype, partial(save_pretrained_folder, model, tokenizer)


def _array_policy(
    request: ExportRequest, config: PolicyConfig, masters: Mapping[str, Tensor]
) -> Chosen:
    if request.dtype not in (None, "float32"):
        raise ValueError(f"dtype {request.dtype}: policies that act on arrays compute in float32")
    policy = build_policy(msgspec.structs.replace(config, path=None), seed=0)
    ModelWeights(policy, torch.device("cpu"), buffers=True).load(masters)
    return policy, torch.float32, partial(save_policy_folder, policy, config)


def main() -> int:
    """Carry out the request on stdin; the result, JSON too, on stdout, or one sentence on stderr."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ExportRequest)
    try:
        exported = export(request)
    except Exception as error:  # the outermost line: whoever asked tells the user
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(exported) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
