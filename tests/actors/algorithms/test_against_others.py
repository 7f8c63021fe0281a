"""Estimates against implementations by others, where one is installed (`pip install torchrl`)."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from algorithm_cases import float64

from actors.algorithms.estimates import generalized_advantages


@pytest.fixture
def torchrl_gae() -> Callable[..., Any]:
    """torchrl's functional GAE; skipped without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn of at import is theirs
        module = pytest.importorskip(
            "torchrl.objectives.value.functional", reason="torchrl is not installed"
        )
    gae: Callable[..., Any] = module.generalized_advantage_estimate
    return gae


@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 1.0), (0.9, 0.95), (0.99, 0.0)])
@pytest.mark.parametrize("ended", [True, False])
def test_gae_is_that_of_torchrl(
    torchrl_gae: Callable[..., Any], gamma: float, lambda_: float, ended: bool
):
    """Two samples of five steps, ended or cut off."""
    torch.manual_seed(3)
    rewards, values = torch.randn(2, 2, 5, dtype=torch.float64)
    last = float64([0.0, 0.0]) if ended else float64([0.7, -0.4])
    done = torch.zeros(2, 5, 1, dtype=torch.bool)
    done[:, -1] = True
    expected, targets = torchrl_gae(
        gamma,
        lambda_,
        values[..., None],
        torch.cat([values[:, 1:], last[:, None]], dim=1)[..., None],
        rewards[..., None],
        done,
        done if ended else torch.zeros_like(done),
    )
    found = generalized_advantages(
        rewards.flatten(),
        values.flatten(),
        last,
        torch.arange(2).repeat_interleave(5),
        gamma=gamma,
        lambda_=lambda_,
    )
    assert torch.allclose(found, expected.flatten())
    assert torch.allclose(found + values.flatten(), targets.flatten())
