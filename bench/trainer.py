"""How fast does the training engine train, beside a plain loop over the same model?

    python -m bench.trainer --json                # one H200, about four minutes
    python -m bench.trainer --ranks 2 --json      # two GPUs beside one, each rank with a load of its own
    python -m bench.trainer --tiny --json         # a few seconds on a CPU: that everything runs

A Qwen3-0.6B-shaped model with random weights, full fine-tuning in bfloat16. `bare` is a plain loop in the same process:
weights in bfloat16, SDPA, fused AdamW, cross-entropy in chunks. Loads: one sequence of 16k tokens; and ragged, lengths
as reinforcement learning has them (log-normal, mean 2k, up to 16k), which the bare loop pads, batch by batch in the
order they come. Engine and bare loop take turns; medians over rounds after warm-up rounds. Tokens are those of the
sequences, not padding. Each part is measured for itself: what fails is told under "errors", the others stay.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.algorithms import registry
from actors.algorithms.config import AlgorithmConfig
from actors.backends.hf_trainer import HFTrainingEngine
from actors.episodes import Action, Group, Segment, Turn
from actors.models.config import LoraConfig
from actors.trainer.config import TrainerConfig

SEED = 0
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # bfloat16, dense
PROMPT_TOKENS = 16
LEARNING_RATE = 1e-6
CLIP = 0.9  # wide, so that every token has a gradient in both
BARE_CHUNK = 2048  # tokens whose logits the bare loop holds
SHAPE = {  # Qwen3-0.6B
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Load:
    """Sequences to train on, with what the sampler is made out to have thought of their tokens."""

    def __init__(self, lengths: Sequence[int], vocabulary: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.sequences = [random.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
        self.rewards = [float(random.choice((-1.0, 1.0))) for _ in lengths]
        self.behaviour = -math.log(vocabulary)
        self.num_tokens = sum(lengths)
        self.num_trained = sum(n - PROMPT_TOKENS for n in lengths)

    def groups(self) -> list[Group]:
        """A group for each sequence, as the trainer gets them."""
        return [
            Group(
                group=place,
                attempt=0,
                run_attempt=0,
                seed=place,
                segments=(
                    Segment(
                        sample=0,
                        turns=(Turn(observation=None, action=self._action(tokens), reward=reward),),
                    ),
                ),
            )
            for place, (tokens, reward) in enumerate(zip(self.sequences, self.rewards, strict=True))
        ]

    def _action(self, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> Action:
        sampled = len(tokens) - PROMPT_TOKENS
        return Action(
            prompt=tokens[:PROMPT_TOKENS],
            tokens=tokens[PROMPT_TOKENS:],
            logprobs=np.full(sampled, self.behaviour, dtype=np.float32),
            versions=np.zeros(sampled, dtype=np.int32),
            mask=np.ones(sampled, dtype=np.bool_),
        )


def ragged_lengths(count: int, mean: int, longest: int) -> list[int]:
    """Log-normal with a deviation of 1 in the logarithm, of about this mean."""
    drawn = np.random.default_rng(SEED).lognormal(math.log(mean) - 0.5, 1.0, count)
    return [int(length) for length in np.clip(drawn, 2 * PROMPT_TOKENS, longest)]


class Bare:
    """The plain loop. `budget` is what a padded batch may have of tokens."""

    def __init__(self, model: Any, device: torch.device, budget: int) -> None:
        self._model = model.to(device, torch.bfloat16)
        self._device = device
        self._budget = budget
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, load: Load) -> float:
        """The mean clipped surrogate over all trained tokens, and one update by it."""
        total = 0.0
        batch: list[int] = []
        order = range(len(load.sequences))
        for place in order:
            widest = max(len(load.sequences[i]) for i in (*batch, place))
            if batch and widest * (len(batch) + 1) > self._budget:
                total += self._backward(load, batch)
                batch = []
            batch.append(place)
        total += self._backward(load, batch)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _backward(self, load: Load, batch: list[int]) -> float:
        widest = max(len(load.sequences[i]) for i in batch)
        tokens = torch.zeros(len(batch), widest, dtype=torch.long)
        trained = torch.zeros(len(batch), widest, dtype=torch.bool)
        for row, i in enumerate(batch):
            sequence = torch.from_numpy(load.sequences[i])
            tokens[row, : len(sequence)] = sequence
            trained[row, PROMPT_TOKENS : len(sequence)] = True
        tokens, trained = tokens.to(self._device), trained.to(self._device)
        rewards = torch.tensor([load.rewards[i] for i in batch], device=self._device)
        # Padding is on the right, where causal attention never looks: no mask, the fastest kernels.
        hidden = self._model.model(input_ids=tokens, use_cache=False).last_hidden_state
        rows, columns = trained.nonzero(as_tuple=True)
        chosen, targets = hidden[rows, columns - 1], tokens[rows, columns]

        def read(hidden: Tensor, targets: Tensor) -> Tensor:
            logits = self._model.lm_head(hidden).float()
            return -cross_entropy(logits, targets, reduction="none")

        logprobs = torch.cat(
            [
                checkpoint(read, *piece, use_reentrant=False)
                for piece in zip(chosen.split(BARE_CHUNK), targets.split(BARE_CHUNK), strict=True)
            ]
        )
        advantages = rewards[rows]
        ratio = (logprobs - load.behaviour).exp()
        surrogate = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
        loss = -surrogate.sum() / load.num_trained
        loss.backward()
        return float(loss.detach())


def build_engine(
    shape: dict[str, Any],
    device: torch.device,
    options: argparse.Namespace,
    lora: LoraConfig | None = None,
) -> HFTrainingEngine:
    group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
    return HFTrainingEngine(
        build_model(shape, device),
        algorithm=registry.find("reinforce_pp"),
        algorithm_config=AlgorithmConfig(
            name="reinforce_pp", normalization="none", clip_low=CLIP, clip_high=CLIP
        ),
        config=TrainerConfig(
            learning_rate=LEARNING_RATE,
            dtype="bfloat16",
            micro_batch_tokens=options.micro_batch_tokens,
            compile=not options.eager,
        ),
        lora=lora,
        device=device,
        process_group=group,
    )


def build_model(shape: dict[str, Any], device: torch.device) -> Any:
    """The same weights every time."""
    torch.manual_seed(SEED)
    with device:
        return Qwen3ForCausalLM(Qwen3Config(**shape, attn_implementation="sdpa"))


def engine_step(engine: HFTrainingEngine, groups: list[Group]) -> float:
    engine.begin_step()
    engine.accumulate(groups)
    return engine.finish_step()["loss"]


def timed(device: torch.device, call: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and what the call gives."""
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - began, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    device: torch.device, calls: dict[str, Callable[[], float]], *, warm_up: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of each call, and what it gave in the first round, when all had the same weights."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    first: dict[str, float] = {}
    for round_ in range(warm_up + rounds):
        for name, call in calls.items():
            took, result = timed(device, call)
            first.setdefault(name, result)
            if round_ >= warm_up:
                seconds[name].append(took)
    return {name: (statistics.median(seconds[name]), first[name]) for name in calls}


def flops(shape: dict[str, Any], lengths: Sequence[int]) -> float:
    """Of forward and backward: six a weight and token, and causal attention; nothing recomputed counts."""
    heads = shape["num_attention_heads"] * shape["head_dim"]
    narrow = shape["num_key_value_heads"] * shape["head_dim"]
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    block = hidden * (2 * heads + 2 * narrow) + 3 * hidden * shape["intermediate_size"]
    weights = layers * block + shape["vocab_size"] * hidden
    attention = 6 * layers * heads * sum(n * n for n in lengths)
    return 6 * weights * sum(lengths) + attention


def profile(device: torch.device, call: Callable[[], float]) -> list[list[Any]]:
    """[kernel, milliseconds, calls] of what takes longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    gpu = device.type == "cuda"
    with record(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as recorded:
        call()
        synchronize(device)
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    return [[e.key[:90], round(getattr(e, key) / 1e3, 2), e.count] for e in events[:20]]


class Bench:
    """One rank's measurements. Parts are methods; `results` grows with each."""

    def __init__(self, options: argparse.Namespace, device: torch.device, rank: int) -> None:
        self.options = options
        self.device = device
        self.rank = rank
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.shape: dict[str, Any] = {**SHAPE, **TINY} if options.tiny else SHAPE
        self.long = 256 if options.tiny else 16_384
        self.results: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.engine: HFTrainingEngine | None = None
        self.bare: Bare | None = None

    def run(self) -> None:
        """Every part; one that fails leaves the others."""
        for part in (
            self.build,
            self.long_sequence,
            self.ragged,
            self.kernels,
            self.memory,
            self.lora,
        ):
            began = time.perf_counter()
            try:
                part()
            except Exception as error:
                traceback.print_exc()
                self.errors[part.__name__] = f"{type(error).__name__}: {error}"[:500]
                if self.ranks > 1:
                    break  # the other ranks are not where this one is any more
            if self.rank == 0:
                took = round(time.perf_counter() - began, 1)
                print(
                    json.dumps({"part": part.__name__, "seconds": took, **self.results}),
                    file=sys.stderr,
                    flush=True,
                )

    def build(self) -> None:
        self.engine = build_engine(self.shape, self.device, self.options)
        if self.ranks == 1:
            model = build_model(self.shape, self.device)
            self.bare = Bare(model, self.device, self.options.micro_batch_tokens)

    def long_sequence(self) -> None:
        """One sequence of 16k on each rank."""
        load = Load([self.long], self.shape["vocab_size"], SEED + self.rank)
        self._compare(load, "_16k", warm_up=3, rounds=5)
        rate = self.results.get("tokens_per_s_16k")
        peak = next((v for name, v in PEAK_FLOPS.items() if name in device_name(self.device)), None)
        if rate and peak:
            of_token = flops(self.shape, [self.long]) / self.long
            self.results["mfu_16k"] = rate * of_token / peak / self.ranks

    def ragged(self) -> None:
        """Many sequences of unlike lengths, of which each rank has its part."""
        count = 8 if self.options.tiny else 64
        lengths = ragged_lengths(count, self.long // 8, self.long)
        load = Load(lengths, self.shape["vocab_size"], SEED)
        self._compare(load, "_ragged", warm_up=1, rounds=3)
        for name in ("tokens_per_s", "bare_tokens_per_s"):
            if f"{name}_ragged" in self.results:
                key = (
                    "ragged_tokens_per_s" if name == "tokens_per_s" else "bare_ragged_tokens_per_s"
                )
                self.results[key] = self.results.pop(f"{name}_ragged")
        self.results["ragged_tokens"] = load.num_tokens

    def kernels(self) -> None:
        """Where a step of 16k goes."""
        if self.ranks > 1:
            return
        load = Load([self.long], self.shape["vocab_size"], SEED)
        engine, bare, groups = self.engine, self.bare, load.groups()
        assert engine is not None
        self.results["profile_16k"] = profile(self.device, lambda: engine_step(engine, groups))
        if bare is not None:
            self.results["bare_profile_16k"] = profile(self.device, lambda: bare.step(load))

    def memory(self) -> None:
        """The most that the engine alone has allocated in a step of 16k."""
        self.bare = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            load = Load([self.long], self.shape["vocab_size"], SEED)
            assert self.engine is not None
            engine_step(self.engine, load.groups())
            self.results["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30

    def lora(self) -> None:
        """The same load with an adapter of rank 16 on all linear layers instead of the whole model."""
        self.engine = self.bare = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.engine = build_engine(self.shape, self.device, self.options, lora=LoraConfig())
        load = Load([self.long], self.shape["vocab_size"], SEED + self.rank)
        self._compare(load, "_lora", warm_up=3, rounds=3)
        self.results["lora_tokens_per_s_16k"] = self.results.pop("tokens_per_s_lora")

    def _compare(self, load: Load, suffix: str, *, warm_up: int, rounds: int) -> None:
        engine, bare, groups = self.engine, self.bare, load.groups()
        assert engine is not None
        calls: dict[str, Callable[[], float]] = {"": lambda: engine_step(engine, groups)}
        if bare is not None:
            calls["bare_"] = lambda: bare.step(load)
        if self.options.tiny:
            warm_up, rounds = 1, 1
        found = take_turns(self.device, calls, warm_up=warm_up, rounds=rounds)
        for name, (seconds, loss) in found.items():
            self.results[f"{name}tokens_per_s{suffix}"] = self.ranks * load.num_tokens / seconds
            self.results[f"{name}loss{suffix}"] = loss


def run_rank(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """Measure, and leave the results of rank 0 in the folder."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    gpu = torch.cuda.is_available() and not options.tiny
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.FileStore(f"{folder}/store", ranks),
            rank=rank,
            world_size=ranks,
        )
    bench = Bench(options, device, rank)
    bench.run()
    if rank == 0:
        results = {**bench.results, **({"errors": bench.errors} if bench.errors else {})}
        Path(folder, f"results-{ranks}.json").write_text(json.dumps(results))
    if dist.is_initialized() and not bench.errors:
        dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One rank, and with --ranks several beside it, each in processes of their own."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="flowd-trainer-") as folder:
        for ranks in sorted({1, options.ranks}):
            mp.spawn(run_rank, args=(ranks, options, folder), nprocs=ranks)
            found = json.loads(Path(folder, f"results-{ranks}.json").read_text())
            results |= found if ranks == 1 else {f"ranks_{ranks}": found}
    many = results.get(f"ranks_{options.ranks}")
    if many:
        for key in ("tokens_per_s_16k", "ragged_tokens_per_s"):
            if key in many and key in results:
                results[f"{key}_over_one_rank"] = many[key] / results[key]
    for ours, theirs, name in (
        ("tokens_per_s_16k", "bare_tokens_per_s_16k", "over_bare_16k"),
        ("ragged_tokens_per_s", "bare_ragged_tokens_per_s", "over_bare_ragged"),
    ):
        if ours in results and theirs in results:
            results[name] = results[ours] / results[theirs]
    return results


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def main() -> int:
    """Exit code 1 where a part failed; what the others measured is printed all the same."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs, beside the run on one")
    parser.add_argument("--tiny", action="store_true", help="a model of two small blocks on a CPU")
    parser.add_argument("--eager", action="store_true", help="the engine without torch.compile")
    parser.add_argument("--micro-batch-tokens", type=int, default=32_768)
    options = parser.parse_args()
    if not options.tiny and torch.cuda.device_count() < options.ranks:
        print(
            f"bench.trainer needs {options.ranks} NVIDIA GPU(s), and torch sees "
            f"{torch.cuda.device_count()}; --tiny runs on a CPU",
            file=sys.stderr,
        )
        return 2
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Loads of unlike shapes by turns would leave the allocator with pieces of no use to the next.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    results = {
        **measure(options),
        "device": "cpu" if options.tiny else torch.cuda.get_device_name(),
        "micro_batch_tokens": options.micro_batch_tokens,
        "compile": not options.eager,
        "seed": SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(results, indent=None if options.json else 2))
    failed = "errors" in results or "errors" in results.get(f"ranks_{options.ranks}", {})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
