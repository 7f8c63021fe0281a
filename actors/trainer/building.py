"""Makes what a trainer rank computes with, from the job: model, process group, engine; and its warm-up.

Loads torch; the actor imports it in its worker thread, flowd's fork server ahead of time.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from actors.algorithms import registry
from actors.backends.action_reader import ActionReader
from actors.backends.hf_trainer import HFTrainingEngine
from actors.backends.reading import Reader
from actors.backends.token_logprobs import TokenLogprobs
from actors.errors import ActorError
from actors.inference.config import COMPUTES
from actors.job_config import JobConfig
from actors.models.loading import build_model
from actors.models.policies import build_policy
from actors.models.text_policy import TextPolicy
from actors.trainer.checkpoint import CheckpointWriter
from actors.trainer.warmup import warm_up as warm_up_model
from channels.lifecycle import ActorSpec
from sim.registry import make

JOIN_S = 120.0  # for all ranks to come; a collective itself waits as long as the job does
COLLECTIVE_S = 7 * 24 * 3600.0  # a dead rank is flowd's business: it takes the replica down


def build_engine(spec: ActorSpec, config: JobConfig) -> HFTrainingEngine:
    """The engine of one rank; with several, returns once all of them have joined."""
    device = torch.device("cuda:0" if spec.devices[0].startswith("cuda") else "cpu")
    model: Any
    reader: Callable[[Any, str | None], Reader]
    if config.policy is None:
        model, _ = build_model(config.model, seed=config.job.seed, dtype=torch.float32)
        reader = TokenLogprobs
    else:
        model = build_policy(config.policy, seed=config.job.seed)
        reader = partial(ActionReader, config=config.policy)
    return HFTrainingEngine(
        model,
        reader=reader,
        algorithm=registry.find(config.algorithm.name),
        algorithm_config=config.algorithm,
        config=config.trainer,
        total_steps=config.job.steps,
        lora=config.model.lora,
        seed=config.job.seed,
        device=device,
        process_group=_process_group(spec, device) if spec.num_ranks > 1 else None,
        given=[what for what in COMPUTES if config.inference.gives(what)],
    )


def build_checkpoint_writer(spec: ActorSpec, config: JobConfig) -> CheckpointWriter:
    """One rank's, after its engine; with several ranks, all of them call this.

    Ranks agree about a checkpoint while the training goes on, so they do it over a group of their own.
    """
    group = dist.new_group(backend="gloo") if spec.num_ranks > 1 else None
    return CheckpointWriter(Path(spec.run_dir), config.checkpoint, group)


def warm_up(
    engine: HFTrainingEngine,
    config: JobConfig,
    cache_dir: Path,
    progress: Callable[..., None],
) -> None:
    """Run the supervised phase on the engine's model, or take it from the cache."""
    _, tokenizer = build_model(config.model, seed=config.job.seed, dtype=torch.float32)
    policy = TextPolicy(tokenizer, generation_config=engine.model.generation_config)
    task = make(config.env.task, num_slots=1, args=config.env.args)
    try:
        warm_up_model(engine.model, policy, tokenizer, task, config, cache_dir, progress)
    finally:
        task.close()


def _backend(spec: ActorSpec, device: torch.device) -> str:
    """NCCL, unless two ranks have slots of one GPU: it refuses a GPU that is there twice."""
    gpus = [name.partition(".")[0] for name in spec.replica_devices]
    distinct = len(set(gpus)) == len(gpus)
    return "nccl" if device.type == "cuda" and distinct else "gloo"


def _process_group(spec: ActorSpec, device: torch.device) -> dist.ProcessGroup:
    """Ranks find each other through a file in the run directory, a fresh one for every start of the replica."""
    rendezvous = Path(spec.run_dir) / f".rendezvous-{spec.replica}.{spec.epoch}"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = FileStore(str(rendezvous), spec.num_ranks)
    store.set_timeout(timedelta(seconds=JOIN_S))
    dist.init_process_group(
        _backend(spec, device),
        store=store,
        rank=spec.rank,
        world_size=spec.num_ranks,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    group = dist.group.WORLD
    if group is None:
        raise ActorError("torch.distributed made no process group")
    return group
