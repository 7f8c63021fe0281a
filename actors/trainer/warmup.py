"""A short supervised phase before reinforcement: next-token loss on the task's own worked examples.

Its result is cached under a name that is a hash of everything it depends on, so it is paid for once.
"""

import hashlib
import inspect
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from actors.backends.contract import Policy
from actors.job_config import JobConfig
from actors.randomness import fold
from actors.trainer.config import WarmupConfig
from sim.contract import ChatMessage, TextObservation, counted_seed

SEED_OF_EXAMPLE = 3  # purpose of the key that makes an example's seed: never a seed of training
REPORT_EVERY_STEPS = 20
LR_RISE_STEPS = 20
BETAS = (0.9, 0.99)  # the long second moment: 0.95 took twice as long on sums of 3 digits
MAX_GRAD_NORM = 1.0
WINDOW = 10  # updates
# Tokens of a prompt, of the answer with its end, and so on in turn.
Example = tuple[list[int], ...]


def warm_up(
    model: Any,
    policy: Policy,
    tokenizer: Any,
    task: Any,
    config: JobConfig,
    cache_dir: Path,
    progress: Callable[..., None],
) -> None:
    """Train `model` in place, or load what an equal phase gave before.

    Prompts are encoded by `policy` turn by turn, as those of rollouts are; answers end with the tokenizer's
    end-of-sequence token. Of a conversation every assistant turn is an answer.

    task: an environment with `examples(seeds) -> list[(observation, answer text)]`, or for several turns
        `conversations(seeds) -> list[list[ChatMessage]]`, each of which ends with an assistant's message
    progress: called with step, steps and cached; unless cached also with loss and expected_reward

    Raises ValueError when the task has no examples, or the tokenizer no token that ends a sequence.
    """
    several_turns = hasattr(task, "conversations")
    if not several_turns and not hasattr(task, "examples"):
        raise ValueError(
            f'[warmup] steps = {config.warmup.steps}, but task "{config.env.task}" has no worked examples: '
            "set warmup.steps = 0, or give the task a method examples(seeds) or conversations(seeds)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, so a warmed-up model would never end its answers: set one "
            "in the model folder's tokenizer_config.json"
        )
    path = cache_dir / f"warmup-{cache_key(config, task)}.safetensors"
    parameters = dict(model.named_parameters())  # tied ones once
    if path.exists():
        saved = load_file(path)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        progress(step=config.warmup.steps, steps=config.warmup.steps, cached=True)
        return

    def examples(first: int, count: int) -> list[Example]:
        if getattr(task, "counted_seeds", False):
            key = fold(config.job.seed, SEED_OF_EXAMPLE)
            seeds = [counted_seed(key, first + i) for i in range(count)]
        else:
            seeds = [fold(config.job.seed, SEED_OF_EXAMPLE, first + i) >> 1 for i in range(count)]
        if several_turns:
            played = [turns_of(messages) for messages in task.conversations(seeds)]
        else:
            played = [[turn] for turn in task.examples(seeds)]
        return [encode_turns(policy, tokenizer, turns) for turns in played]

    _train(model, examples, config.warmup, progress)
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, partial)
    os.replace(partial, path)


def cache_key(config: JobConfig, task: Any) -> str:
    """A hash of all that the result depends on: versions, seed, model, task and its code, the phase itself."""
    folder = None
    if config.model.path is not None:
        files = sorted(p for p in Path(config.model.path).iterdir() if p.is_file())
        folder = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    model = msgspec.to_builtins(config.model)
    del model["lora"]  # put on afterwards
    what = {
        "versions": [torch.__version__, transformers.__version__],
        "code": [_source(sys.modules[__name__]), _source(sys.modules[type(task).__module__])],
        "seed": config.job.seed,
        "model": [model, folder],
        "task": [config.env.task, config.env.args],
        "warmup": msgspec.to_builtins(config.warmup),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _source(module: Any) -> str:
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""  # made in memory, or shipped without source


def turns_of(conversation: Sequence[ChatMessage]) -> list[tuple[TextObservation, str]]:
    """What was said to the assistant since its last turn, and its answer, turn by turn."""
    turns = []
    new: list[ChatMessage] = []
    for message in conversation:
        if message.role == "assistant":
            turns.append((TextObservation(messages=tuple(new)), message.content))
            new = []
        else:
            new.append(message)
    if new or not turns:
        raise ValueError(
            "a worked conversation must end with an assistant's message; its roles are "
            f"{', '.join(message.role for message in conversation) or 'none'}"
        )
    return turns


def encode_turns(policy: Policy, tokenizer: Any, turns: Sequence[tuple[Any, str]]) -> Example:
    """The tokens that rollouts would have, had the policy given these answers."""
    parts: list[list[int]] = []
    for observation, text in turns:
        history = np.array([token for part in parts for token in part], dtype=np.int32)
        parts.append(policy.encode(history, observation).tolist())
        answer = tokenizer.encode(text, add_special_tokens=False)
        parts.append([*answer, tokenizer.eos_token_id])
    return tuple(parts)


def _train(
    model: Any,
    examples: Callable[[int, int], list[Example]],
    config: WarmupConfig,
    progress: Callable[..., None],
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=BETAS, weight_decay=0.0, fused=True
    )
    recent: deque[float] = deque(maxlen=WINDOW)
    for step in range(config.steps):
        rise = min(1.0, (step + 1) / LR_RISE_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rise
        batch = examples(step * config.batch_size, config.batch_size)
        tempered, logprobs, rows = answer_logprobs(model, batch, config.temperature)
        loss = -tempered.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # What sampling at temperature 1 would score: the probability of each whole answer; of several turns, of all.
        answers = torch.zeros(len(batch), device=rows.device).index_add_(0, rows, logprobs)
        recent.append(float(answers.exp().mean()))
        expected_reward = sum(recent) / len(recent)
        reached = len(recent) == WINDOW and expected_reward >= config.until_reward
        last = step + 1 == config.steps or reached
        if last or (step + 1) % REPORT_EVERY_STEPS == 0:
            progress(
                step=step + 1,
                steps=config.steps,
                loss=float(loss.detach()),
                expected_reward=expected_reward,
                cached=False,
            )
        if last:
            break


def answer_logprobs(
    model: Any, examples: Sequence[Example], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the answers' tokens at a temperature, with gradient, and at temperature 1, without.

    Returns both, float32 [tokens], and whose each token is, int64 [tokens].
    """
    device = next(model.parameters()).device
    longest = max(sum(map(len, parts)) for parts in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    trained = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, parts in enumerate(examples):
        start = 0
        for place, part in enumerate(parts):
            tokens[row, start : start + len(part)] = torch.tensor(part)
            trained[row, start : start + len(part)] = place % 2 == 1
            start += len(part)
    tokens, trained = tokens.to(device), trained.to(device)
    # Padding is on the right, where causal attention never looks: no mask is needed.
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    rows, columns = trained.nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(hidden[rows, columns - 1]).float()
    targets = tokens[rows, columns]
    tempered = -cross_entropy(logits / temperature, targets, reduction="none")
    with torch.no_grad():
        plain = -cross_entropy(logits, targets, reduction="none")
    return tempered, plain, rows
