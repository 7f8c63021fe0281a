"""What bench.weights makes of its figures, and one short run of it; what it measures is for a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.qwen2 import make_state
from bench.weights import judged


@pytest.mark.parametrize(("ours", "reached"), [(8.5, True), (8.49, False)])
def test_a_bar_is_reached_by_standing_on_it(ours: float, reached: bool) -> None:
    """0.85 of the bare copies."""
    result = judged({"weights_gb_per_s": ours, "bare_weights_gb_per_s": 10.0})
    assert result["bar_reached"] is reached


def test_the_state_is_qwen2s() -> None:
    """Names, and number of parameters with tied embeddings, as the model has them."""
    for size, parameters in (("0.5b", 494_032_768), ("1.5b", 1_543_714_304)):
        state = make_state(size, "meta")
        assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert "model.layers.27.self_attn.k_proj.bias" in state


def test_every_variant_is_measured_and_checked() -> None:
    """A run with small tensors gives all figures: its exit code says only whether the machine was quiet."""
    command = [sys.executable, "-m", "bench.weights", "--json", "--rounds", "1", "--size", "tiny"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=100
    )
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    for kind in ("", "bare_", "delta_", "sharded_"):
        assert result[f"{kind}weights_gb_per_s"] > 0
        assert len(result[f"{kind}seconds"]) == 1
    assert 0 < result["delta_bytes"] < result["size_bytes"]
