"""State dicts of Qwen2's names and shapes, for benches that move weights."""

from collections.abc import Mapping

import torch

from channels.weights.delta import as_integers

SIZES = {  # layers, hidden, intermediate, key and value width
    "0.5b": (24, 896, 4864, 128),
    "1.5b": (28, 1536, 8960, 256),
    "tiny": (2, 64, 128, 16),
}
VOCABULARY = 151_936


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 with tied embeddings."""
    layers, hidden, wide, narrow = SIZES[size]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY if size != "tiny" else 1000, hidden)
    }
    for layer in range(layers):
        found |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.q_proj.weight": (hidden, hidden),
                "self_attn.q_proj.bias": (hidden,),
                "self_attn.k_proj.weight": (narrow, hidden),
                "self_attn.k_proj.bias": (narrow,),
                "self_attn.v_proj.weight": (narrow, hidden),
                "self_attn.v_proj.bias": (narrow,),
                "self_attn.o_proj.weight": (hidden, hidden),
                "mlp.gate_proj.weight": (wide, hidden),
                "mlp.up_proj.weight": (wide, hidden),
                "mlp.down_proj.weight": (hidden, wide),
                "input_layernorm.weight": (hidden,),
                "post_attention_layernorm.weight": (hidden,),
            }.items()
        }
    return found | {"model.norm.weight": (hidden,)}


def make_state(size: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Zeros: touched, so that no copy meets a fresh page."""
    return {
        name: torch.zeros(shape, dtype=torch.bfloat16, device=device)
        for name, shape in shapes(size).items()
    }


def randomize(state: Mapping[str, torch.Tensor], seed: int) -> None:
    """Normal weights, the same on every call with this seed."""
    device = next(iter(state.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    for tensor in state.values():
        tensor.normal_(0.0, 0.02, generator=generator)


def change(state: Mapping[str, torch.Tensor], fraction: float, seed: int) -> None:
    """Flip the lowest bit of so many elements of each tensor, as a small step in bfloat16 does."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        count = max(1, int(tensor.numel() * fraction))
        places = torch.randint(tensor.numel(), (count,), generator=generator)
        as_integers(tensor)[places] ^= 1


def copy(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Tensor by tensor."""
    for name, tensor in target.items():
        tensor.copy_(source[name])
