"""How fast does the small generation engine decode, beside transformers' own `generate`?

    python -m bench.engine --json                       # CPU, one thread, the demo's model
    python -m bench.engine --device cuda --dtype bfloat16 --model FOLDER --json

Two loads, each run by both in interleaved rounds, medians over rounds after one warm-up round:
equal: one batch whose sequences all have the same length, the best case of a static batch
mixed: twice as many sequences, whose lengths differ; `generate` runs them batch after batch, each
to its longest Tokens per second count the tokens that were asked for, over the whole run, prefill
included. The engine's numbers include log-probs, which `generate` is not asked for.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from actors.backends.contract import GenerationRequest
from actors.backends.hf_engine import HFGenerationEngine
from actors.models.config import ModelConfig
from actors.models.loading import build_model
from actors.randomness import fold

SEED = 0


class Load:
    """Prompts of one length, and how many tokens each is to be given."""

    def __init__(self, vocabulary: int, prompt_tokens: int, new_tokens: list[int]) -> None:
        rng = np.random.default_rng(SEED)
        shape = (len(new_tokens), prompt_tokens)
        self.prompts = rng.integers(0, vocabulary, size=shape).astype(np.int32)
        self.new_tokens = new_tokens

    @property
    def num_tokens(self) -> int:
        return sum(self.new_tokens)


def run_engine(engine: HFGenerationEngine, load: Load) -> list[float]:
    """Run a load to its end. Returns the seconds of each step."""
    waiting = [
        GenerationRequest(request_id=i, context=prompt, max_new_tokens=new, key=fold(SEED, i))
        for i, (prompt, new) in enumerate(zip(load.prompts, load.new_tokens, strict=True))
    ]
    waiting.reverse()
    steps, done = [], 0
    while waiting or engine.num_running:
        while waiting and engine.free_slots:
            engine.add(waiting.pop())
        begun = time.perf_counter()
        done += sum(len(generation.tokens) for generation in engine.step())
        steps.append(time.perf_counter() - begun)
    assert done == load.num_tokens
    return steps


def run_generate(model: Any, load: Load, batch_size: int) -> None:
    """Run a load batch after batch, each to its longest sequence."""
    for first in range(0, len(load.new_tokens), batch_size):
        longest = max(load.new_tokens[first : first + batch_size])
        # No end-of-sequence token: random weights would end sequences at will.
        config = GenerationConfig(
            max_new_tokens=longest, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
        )
        prompts = torch.from_numpy(load.prompts[first : first + batch_size].astype(np.int64))
        prompts = prompts.to(model.device)
        output = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=config
        )
        assert output.shape[1] == load.prompts.shape[1] + longest


def timed(device: str, call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    begun = time.perf_counter()
    result = call(*arguments)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model, served = (
        build_model(ModelConfig(path=options.model), seed=SEED, dtype=dtype)[0] for _ in range(2)
    )
    model.to(options.device)
    engine = HFGenerationEngine(
        served,
        max_running=options.batch,
        max_context_tokens=options.prompt_tokens + options.new_tokens,
        pad_token=0,
        device=options.device,
        dtype=dtype,
    )
    vocabulary = int(model.config.get_text_config().vocab_size)
    lengths = np.random.default_rng(SEED).integers(
        max(1, options.new_tokens // 8), options.new_tokens, size=2 * options.batch, endpoint=True
    )
    loads = {
        "equal": Load(vocabulary, options.prompt_tokens, [options.new_tokens] * options.batch),
        "mixed": Load(vocabulary, options.prompt_tokens, lengths.tolist()),
    }
    rates: dict[str, list[float]] = {}
    steps: list[float] = []
    for round_ in range(options.rounds + 1):
        for name, load in loads.items():
            seconds, engine_steps = timed(options.device, run_engine, engine, load)
            generate_seconds, _ = timed(options.device, run_generate, model, load, options.batch)
            if round_ == 0:
                continue  # warm-up: allocations, kernels chosen
            rates.setdefault(f"engine_{name}", []).append(load.num_tokens / seconds)
            rates.setdefault(f"generate_{name}", []).append(load.num_tokens / generate_seconds)
            if name == "equal":
                steps += engine_steps[1:]  # the first one prefills
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "engine_tokens_per_s": medians["engine_equal"],
        "generate_tokens_per_s": medians["generate_equal"],
        "engine_over_generate": medians["engine_equal"] / medians["generate_equal"],
        "engine_mixed_tokens_per_s": medians["engine_mixed"],
        "generate_mixed_tokens_per_s": medians["generate_mixed"],
        "engine_over_generate_mixed": medians["engine_mixed"] / medians["generate_mixed"],
        "decode_step_ms_p50": 1e3 * statistics.median(steps),
        "batch": options.batch,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": options.dtype,
        "seed": SEED,
        **hardware(options),
    }


def hardware(options: argparse.Namespace) -> dict[str, Any]:
    """What it ran on."""
    device = torch.cuda.get_device_name() if options.device != "cpu" else cpu_name()
    return {
        "device": device,
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--model", help="a Hugging Face model folder; default: the demo's model")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU")
    parser.add_argument("--batch", type=int, default=128, help="sequences at one time")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in results.items():
            print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")


if __name__ == "__main__":
    main()
