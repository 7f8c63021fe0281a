"""Writes the policy of a commit as a folder: `python -m actors.trainer.export`, a request on stdin.

Of a language model it is a Hugging Face folder, of a policy that acts on arrays one that [policy] path can name. Of a
job that trains an adapter it is the model with the adapter merged in, or the adapter as peft's folder, or the model
without it.

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

from actors.backends.contract import ADAPTER, BASE
from actors.backends.hf_weights import ModelWeights
from actors.backends.lora import WRONG_BASE, base_checksum, merge, save_peft_folder
from actors.backends.reference_file import read_reference
from actors.conductor.manifest import FILE, checkpoint_dir, read_manifest
from actors.errors import BadCheckpoint
from actors.job_config import JobConfig
from actors.models.config import PolicyConfig
from actors.models.policies import build_policy, save_policy_folder
from actors.trainer.shard_files import Shards, sync

POLICY = "model."
CRITIC = "critic."


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to export where.

    folder: is made, with those above it, or is empty    dtype: a name of torch's; None is the masters' own
    part: "policy"; of a job that trains an adapter also "adapter" or "base", what it goes on top of
    """

    config: JobConfig
    run_dir: str
    step: int
    folder: str
    dtype: str | None = None
    part: str = "policy"


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
    policy = request.config.policy
    if request.part == "adapter":
        chosen = _adapter(request, _named(shards, ADAPTER))
    elif request.config.model.lora is not None:
        chosen = _adapted_model(request, shards)
    elif policy is None:
        chosen = _language_model(request, _named(shards, POLICY))
    else:
        chosen = _array_policy(request, policy, _named(shards, POLICY))
    parameters, dtype, save = chosen
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
        parameters=parameters,
        size_bytes=size_bytes,
    )


# How many parameters, of which dtype, and what writes them.
Chosen = tuple[int, torch.dtype, Callable[[Path], None]]


def _named(shards: Shards, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): shards[name] for name in shards if name.startswith(prefix)}


def _language_model(request: ExportRequest, masters: Mapping[str, Tensor]) -> Chosen:
    # Here: transformers takes seconds to import, and a policy that acts on arrays needs none of it.
    from actors.models.loading import build_model, save_pretrained_folder

    masters = {name: tensor for name, tensor in masters.items() if not name.startswith(CRITIC)}
    dtype = _dtype(request, next(iter(masters.values())).dtype)
    model, tokenizer = build_model(request.config.model, seed=request.config.job.seed, dtype=dtype)
    ModelWeights(model, torch.device("cpu")).load(masters)
    return _size(model), dtype, partial(save_pretrained_folder, model, tokenizer)


def _adapter(request: ExportRequest, adapter: Mapping[str, Tensor]) -> Chosen:
    config = request.config
    assert config.model.lora is not None
    dtype = _dtype(request, next(iter(adapter.values())).dtype)
    adapter = {name: tensor.to(dtype) for name, tensor in adapter.items()}
    path = None if config.warmup.steps else config.model.path
    save = partial(save_peft_folder, adapter, config.model.lora, path)
    return sum(tensor.numel() for tensor in adapter.values()), dtype, save


def _adapted_model(request: ExportRequest, shards: Shards) -> Chosen:
    """The frozen model, as the trainer computes with it, with the adapter in it unless it alone is asked for."""
    from actors.models.loading import build_model, cast_parameters, save_pretrained_folder

    config = request.config
    assert config.model.lora is not None
    adapter = _named(shards, ADAPTER)
    masters = next(iter(adapter.values())).dtype
    dtype = _dtype(request, masters)
    model, tokenizer = build_model(config.model, seed=config.job.seed, dtype=masters)
    weights = ModelWeights(model, torch.device("cpu"))
    base: Mapping[str, Tensor] = read_reference(Path(request.run_dir)) or weights.in_place()
    frozen = torch.bfloat16 if config.trainer.dtype == "bfloat16" else masters
    base = {name: tensor.to(frozen) for name, tensor in base.items()}
    if not torch.equal(base_checksum(base), shards[BASE]):
        raise BadCheckpoint(WRONG_BASE)
    weights.load(
        base if request.part == "base" else dict(merge(base, adapter, config.model.lora.scale))
    )
    cast_parameters(model, dtype)
    model.config.dtype = dtype
    return _size(model), dtype, partial(save_pretrained_folder, model, tokenizer)


def _array_policy(
    request: ExportRequest, config: PolicyConfig, masters: Mapping[str, Tensor]
) -> Chosen:
    if request.dtype not in (None, "float32"):
        raise ValueError(f"dtype {request.dtype}: policies that act on arrays compute in float32")
    policy = build_policy(msgspec.structs.replace(config, path=None), seed=0)
    ModelWeights(policy, torch.device("cpu"), buffers=True).load(masters)
    return _size(policy), torch.float32, partial(save_policy_folder, policy, config)


def _dtype(request: ExportRequest, own: torch.dtype) -> torch.dtype:
    if request.dtype is None:
        return own
    dtype: torch.dtype = getattr(torch, request.dtype)
    return dtype


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


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
