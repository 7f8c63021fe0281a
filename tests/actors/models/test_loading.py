"""Random models from numbers, and folders that can or cannot be loaded."""

import re
from pathlib import Path

import pytest
import torch

from actors.backends.hf_engine import HFGenerationEngine
from actors.models.config import ModelConfig
from actors.models.loading import build_model, save_pretrained_folder

TINY = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model with its tokenizer."""
    save_pretrained_folder(*build_model(TINY, seed=3), tmp_path / "model")
    return tmp_path / "model"


def test_weights_depend_on_the_seed_alone():
    """Not on the global random state, which stays as it was."""
    torch.manual_seed(1)
    first = build_model(TINY, seed=5)[0].state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    again, other = (build_model(TINY, seed=seed)[0].state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_model_is_ready_to_generate_and_fits_its_tokenizer():
    """Tied embeddings of the tokenizer's size, special tokens in the generation config, no dropout."""
    model, tokenizer = build_model(TINY, seed=0, dtype=torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (len(tokenizer), 16)
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_rotary_frequencies_are_the_same_in_every_precision():
    """Those that the trainer has: also in the engine that samples in bfloat16."""
    exact = build_model(TINY, seed=0)[0].model.rotary_emb.inv_freq
    model, _ = build_model(TINY, seed=0, dtype=torch.bfloat16)
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    model, tokenizer = build_model(TINY, seed=0)
    HFGenerationEngine(
        model,
        max_running=1,
        max_context_tokens=8,
        pad_token=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_initializer_range_is_the_spread_of_the_weights():
    """Small models learn sooner with more than the usual 0.02."""
    config = ModelConfig(
        hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64, initializer_range=0.5
    )
    model, _ = build_model(config, seed=0)
    assert float(model.model.layers[0].mlp.up_proj.weight.std().detach()) == pytest.approx(
        0.5, rel=0.1
    )


def test_a_saved_folder_loads_as_it_was(folder: Path):
    """Weights, and tokenizer with chat template."""
    model, tokenizer = build_model(TINY, seed=3)
    loaded, loaded_tokenizer = build_model(ModelConfig(path=str(folder)), seed=0)
    expected, weights = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert loaded.dtype == torch.float32
    assert loaded_tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["config.json"], "has no config.json"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
        (["model.safetensors"], "cannot be loaded as a causal language model"),
    ],
)
def test_a_folder_that_lacks_a_part_is_refused(folder: Path, removed: list[str], message: str):
    """One sentence with the path; nothing is looked for elsewhere."""
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=re.escape(f'[model] path = "{folder}" {message}')):
        build_model(ModelConfig(path=str(folder)), seed=0)


def test_a_missing_folder_is_refused():
    """A hub name is not a folder."""
    with pytest.raises(
        ValueError, match=r'path = "no/where" is not a folder.*nothing is downloaded'
    ):
        build_model(ModelConfig(path="no/where"), seed=0)


def test_a_width_that_does_not_fit_the_heads_is_refused():
    """With one that does."""
    config = ModelConfig(hidden_size=50, num_heads=4)
    with pytest.raises(ValueError, match=r"hidden_size = 50: .* num_heads = 4 .*; use 56"):
        build_model(config, seed=0)


def test_an_unknown_tokenizer_is_refused():
    """It names the built-in one."""
    with pytest.raises(ValueError, match='tokenizer = "words": built in is characters'):
        build_model(ModelConfig(tokenizer="words"), seed=0)
