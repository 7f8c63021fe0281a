"""The example of docs/policies.md is a whole policy."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.config import PolicyConfig
from actors.models.policies import build_policy

DOCUMENT = Path(__file__).parents[3] / "docs" / "policies.md"


def test_the_example_of_the_documents_acts_and_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its import path, in under 60 lines; the trainer reads what the rollout sampled."""
    found = re.search(r"<!-- example -->\n```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    assert found[1].count("\n") < 60
    (tmp_path / "policy_of_the_documents.py").write_text(found[1])
    monkeypatch.syspath_prepend(tmp_path)
    given: dict[str, Any] = {"observation": {"state": [3]}, "action": 2, "high": [1.0, 4.0]}
    config = PolicyConfig(kind="policy_of_the_documents:Linear", **given)
    policy = build_policy(config, seed=0)
    seen = {"state": torch.randn(5, 3)}
    acted = policy.act(seen, torch.rand(5, policy.draws, dtype=torch.float64), greedy=False)
    read = policy.evaluate(seen, acted.recompute)
    torch.testing.assert_close(read.logprobs.detach(), acted.logprobs)
    torch.testing.assert_close(read.values.detach(), acted.values)
    assert bool((acted.actions <= torch.tensor([1.0, 4.0])).all())


def test_a_policy_that_is_not_there_is_named() -> None:
    """With what is built in."""
    with pytest.raises(ValueError, match="built in are actor_critic, tokens"):
        build_policy(
            PolicyConfig(kind="nowhere:Linear", observation={"state": [3]}, action=2), seed=0
        )
