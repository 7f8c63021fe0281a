"""Advantage estimates against cases worked by hand and loops."""

import math

import pytest
import torch
from algorithm_cases import episodes, float64, one_token_each, settings
from hypothesis import given
from hypothesis import strategies as st

from actors.algorithms import estimates, ppo, registry, rewards
from actors.algorithms.config import PAPERS

REWARDS = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=6), max_size=4)


def test_leave_one_out_by_hand():
    """1 of [1, 0, 0, 0] against the mean 0 of the others; a 0 against 1/3. A group of one has nobody to compare."""
    episodes_ = one_token_each([1, 0, 0, 0], [3])
    found = estimates.leave_one_out(episodes_.returns, episodes_.groups)
    assert found.tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, 0])


@given(REWARDS)
def test_groups_are_compared_within_themselves(groups: list[list[float]]):
    """A loop over groups and members gives the same, for centring, leave-one-out and the group's deviation."""
    cases = one_token_each(*groups)
    centred, left_out, divided = [], [], []
    for group in groups:
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
        for place, reward in enumerate(group):
            others = [r for other, r in enumerate(group) if other != place]
            centred.append(reward - mean)
            left_out.append(reward - math.fsum(others) / len(others) if others else 0.0)
            divided.append((reward - mean) / std if std > 1e-6 else 0.0)
    found = estimates.centre_by_group(cases.returns, cases.groups)
    assert found.tolist() == pytest.approx(centred, abs=1e-9)
    loo = estimates.leave_one_out(cases.returns, cases.groups)
    assert loo.tolist() == pytest.approx(left_out, abs=1e-9)
    if all(not 1e-8 < abs(c) < 1e-5 for c in centred):  # not at the floor itself
        found = estimates.divide_by_group_std(found, cases.groups)
        assert found.tolist() == pytest.approx(divided, abs=1e-6)


def test_gae_by_hand():
    """Two steps, rewards 0 and 1, values 0.5 and 0.8, gamma 0.9, lambda 0.5: deltas 0.22 and 0.2."""
    found = estimates.generalized_advantages(
        float64([0, 1]),
        float64([0.5, 0.8]),
        float64([0]),
        torch.tensor([0, 0]),
        gamma=0.9,
        lambda_=0.5,
    )
    assert found.tolist() == pytest.approx([0.22 + 0.45 * 0.2, 0.2])


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_the_double_sum_of_its_definition(
    samples: list[list[tuple[float, float]]], gamma: float, lambda_: float
):
    """Equation 16 written out: the sum over l of (gamma lambda)^l delta, per sample, with a value at the end."""
    ends = [0.3 * place for place in range(len(samples))]
    expected = []
    for steps, end in zip(samples, ends, strict=True):
        values = [value for _, value in steps] + [end]
        deltas = [r + gamma * values[t + 1] - values[t] for t, (r, _) in enumerate(steps)]
        expected += [
            math.fsum((gamma * lambda_) ** ahead * d for ahead, d in enumerate(deltas[t:]))
            for t in range(len(steps))
        ]
    found = estimates.generalized_advantages(
        float64([r for steps in samples for r, _ in steps]),
        float64([v for steps in samples for _, v in steps]),
        float64(ends),
        torch.tensor([place for place, steps in enumerate(samples) for _ in steps]),
        gamma=gamma,
        lambda_=lambda_,
    )
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_gae_over_turns_gives_all_tokens_of_a_turn_one_advantage():
    """Each turn is one step with the value at its first token; the returns are the advantages plus the values."""
    config = settings("ppo", gae_level="turn", gamma=0.5)
    cases = episodes(
        [[[2, 1.0], [1, 3.0]]], values=[0.1, 9.0, 0.2], last_values=[0.0]
    )  # the 9.0 inside a turn is not looked at
    targets = ppo.advantages(cases, config)
    assert targets.advantages.tolist() == pytest.approx([1 + 0.5 * 3 - 0.1] * 2 + [2.8])
    assert targets.returns is not None
    assert targets.returns.tolist() == pytest.approx([2.5, 2.4 + 9.0, 3.0])


def test_with_lambda_one_and_no_values_ppo_has_the_rewards_to_go():
    """Then it is REINFORCE++ before normalisation."""
    cases = episodes(
        [[[2, 1.0], [3, 2.0]]], [[[1, -1.0]]], values=[0.0] * 6, last_values=[0.0, 0.0]
    )
    to_go = registry.find("reinforce_pp").advantages(cases, settings("reinforce_pp", gamma=0.9))
    found = ppo.advantages(cases, settings("ppo", gamma=0.9))
    assert torch.equal(found.advantages, to_go.advantages)
    hand = [0.9 * 1 + 0.9**4 * 2, 1 + 0.9**3 * 2, 0.81 * 2, 0.9 * 2, 2.0, -1.0]
    assert found.advantages.tolist() == pytest.approx(hand)


def test_the_batch_normalises_to_mean_zero_and_deviation_one():
    """And equal advantages to zero, instead of rounding errors blown up."""
    values = float64([1.0, 2.0, 6.0])
    std = float(values.std(correction=0))
    assert estimates.normalize_by_batch(values, 3.0, std).tolist() == pytest.approx(
        [-2 / std, -1 / std, 3 / std]
    )
    assert not estimates.normalize_by_batch(values, 3.0, 0.0).any()


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(
    "groups",
    [[], [[[[0, 1.0]]]], [[[[1, 1.0]]]], [[[[2, 0.5]], [[1, 0.5]], [[0, 0.5]]]]],
    ids=["none", "no token", "one of one", "equal"],
)
def test_degenerate_groups_are_finite(name: str, groups: list[list[list[list[float]]]]):
    """No group, a sample without a token, a group of one, equal rewards: zero where samples are compared."""
    cases = episodes(*groups)
    if PAPERS[name].critic:
        tokens, samples = len(cases.samples), len(cases.returns)
        cases = episodes(*groups, values=[0.0] * tokens, last_values=[0.0] * samples)
    found = registry.find(name).advantages(cases, settings(name)).advantages
    assert found.shape == cases.samples.shape
    assert found.isfinite().all()
    if PAPERS[name].compares:
        assert not found.any()


def test_the_overlong_penalty_falls_over_the_cache():
    """DAPO, equation 13, with 10 tokens at most and a cache of 4: none up to 6, all from 10 on."""
    config = settings("dapo", overlong_max_tokens=10, overlong_cache_tokens=4)
    found = rewards.soft_overlong_penalty(torch.tensor([0, 6, 7, 8, 10, 50]), config)
    assert found.tolist() == [0, 0, -0.25, -0.5, -1, -1]
    assert not rewards.soft_overlong_penalty(torch.tensor([0, 999]), settings("dapo")).any()
