"""Makes the model that a job trains, and its tokenizer: from a Hugging Face folder, or random from a few numbers."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from actors.models.config import ModelConfig
from actors.models.tokenizer import build_characters_tokenizer

TOKENIZERS = {"characters": build_characters_tokenizer}
TOKENIZER_FILES = ("tokenizer", "vocab", "spiece", "sentencepiece")
MAX_POSITIONS = 32768  # rotary embeddings need no table, so a long limit costs nothing


def build_model(
    config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on the CPU, with weights of `dtype`, and its tokenizer.

    Without `path` the weights are drawn from `seed` alone; the global random state is left as it was.
    Raises ValueError when the folder, its config or its tokenizer is missing, or numbers do not fit. Nothing is
    downloaded.
    """
    if config.path is None:
        return _random_model(config, seed=seed, dtype=dtype)
    return _load_folder(Path(config.path), dtype=dtype)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Change the parameters' dtype, in place, and leave buffers as they are.

    The frequencies of rotary embeddings stay in float32, as the trainer has them: in bfloat16 angles would be off by
    whole radians after some hundred positions.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save_pretrained_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write a folder that `build_model` and any Hugging Face tool can load."""
    logging.disable_progress_bar()  # who asked has a sentence to read, not bars
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _random_model(
    config: ModelConfig, *, seed: int, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if config.hidden_size % (2 * config.num_heads):
        raise ValueError(
            f"[model] hidden_size = {config.hidden_size}: the rule is a multiple of twice num_heads = "
            f"{config.num_heads} (heads of even width); "
            f"use {-(-config.hidden_size // (2 * config.num_heads)) * 2 * config.num_heads}"
        )
    if config.tokenizer not in TOKENIZERS:
        raise ValueError(
            f'[model] tokenizer = "{config.tokenizer}": built in is {", ".join(TOKENIZERS)}; '
            "for another tokenizer point path at a Hugging Face folder"
        )
    tokenizer = TOKENIZERS[config.tokenizer]()
    model_config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=config.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(model_config)
    cast_parameters(model, dtype)
    return model.eval(), tokenizer


def _load_folder(
    folder: Path, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not folder.is_dir():
        raise ValueError(
            f'[model] path = "{folder}" is not a folder: give a local Hugging Face model folder '
            "(nothing is downloaded)"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f'[model] path = "{folder}" has no config.json: give the folder that holds the '
            "model's config, weights and tokenizer"
        )
    logging.disable_progress_bar()  # an actor's log has lines, not bars
    # For some models transformers makes an empty tokenizer where the folder has none.
    if not any(file.name.startswith(TOKENIZER_FILES) for file in folder.iterdir()):
        raise ValueError(
            f'[model] path = "{folder}" has no tokenizer: put the model\'s tokenizer.json and '
            "tokenizer_config.json into it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'[model] path = "{folder}" has no tokenizer that transformers can load: {error}'
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'[model] path = "{folder}" cannot be loaded as a causal language model: {error}'
        ) from error
    return model.eval(), tokenizer
