"""Policies that act on arrays: what is trained is what was sampled, whatever the company."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.models.action_policy import Acted, ActionPolicy, Read, normals
from actors.models.config import PolicyConfig, broken_rule
from actors.models.policies import build_policy

IMAGE = [40, 40, 3]
CONFIGS: dict[str, dict[str, Any]] = {
    "state": {"observation": {"state": [5]}, "action": 3, "chunk": 2},
    "squashed": {"observation": {"state": [5]}, "action": 3, "squash": True, "std_by_state": True},
    "discrete": {"observation": {"state": [5]}, "action": 4, "discrete": True},
    "images": {
        "observation": {"rgb": IMAGE, "wrist": IMAGE, "joints": [4]},
        "action": 2,
        "chunk": 3,
    },
    "tokens": {
        "kind": "tokens",
        "observation": {"rgb": IMAGE, "joints": [4], "text": [12]},
        "instruction": "text",
        "action": 3,
        "chunk": 2,
        "low": [-1.0, 0.0, 2.0],
        "high": [1.0, 0.5, 4.0],
    },
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PolicyConfig:
    """One of every kind."""
    return PolicyConfig(**CONFIGS[request.param])


def observed(config: PolicyConfig, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random observations; instructions of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    seen: dict[str, Tensor] = {}
    for name, shape in config.observation.items():
        if len(shape) == 3:
            seen[name] = torch.randint(0, 256, (batch, *shape), generator=draw).to(torch.uint8)
        elif name == config.instruction:
            text = torch.randint(97, 122, (batch, *shape), generator=draw)
            length = torch.randint(1, shape[0] + 1, (batch, 1), generator=draw)
            seen[name] = torch.where(torch.arange(shape[0]) < length, text, 0).to(torch.uint8)
        else:
            seen[name] = 3.0 + torch.randn(batch, *shape, generator=draw)
    return seen


def act(policy: ActionPolicy, seen: dict[str, Tensor], *, greedy: bool = False) -> Acted:
    """With fixed draws."""
    batch = len(next(iter(seen.values())))
    draw = torch.Generator().manual_seed(7)
    uniforms = torch.rand(batch, policy.draws, dtype=torch.float64, generator=draw)
    return policy.act(seen, uniforms, greedy=greedy)


def again(policy: ActionPolicy, seen: dict[str, Tensor], acted: Acted) -> Read:
    """As the trainer reads it."""
    recompute = dict(acted.recompute)
    if acted.tokens is not None:
        recompute["tokens"] = acted.tokens
    return policy.evaluate(seen, recompute)


def trained(config: PolicyConfig) -> ActionPolicy:
    """A policy that is no longer what it began as."""
    policy = build_policy(config, seed=1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    seen = policy.rows(observed(config, 50, seed=9))
    for name, moments in policy.observed().items():
        moments.add(moments.moments(seen[name]))
    return policy


def test_what_was_sampled_is_read_again(config: PolicyConfig) -> None:
    """Log-probs and values of the rollout are those of the trainer, and carry gradient there."""
    policy, seen = trained(config), observed(config, 6)
    acted = act(policy, seen)
    read = again(policy, seen, acted)
    units = config.chunk * policy.units_per_step
    assert acted.logprobs.shape == read.entropy.shape == (6, units)
    torch.testing.assert_close(read.logprobs.detach(), acted.logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(read.values.detach(), acted.values, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(policy.value(seen).detach(), acted.values, atol=2e-5, rtol=1e-5)
    (read.logprobs.sum() + read.values.sum() + read.entropy.sum()).backward()
    missing = [name for name, p in policy.named_parameters() if p.grad is None]
    assert missing == []


def test_an_action_does_not_depend_on_its_company(config: PolicyConfig) -> None:
    """A row alone does what it does in a batch."""
    policy, seen = trained(config), observed(config, 5)
    together = act(policy, seen)
    draw = torch.Generator().manual_seed(7)
    uniforms = torch.rand(5, policy.draws, dtype=torch.float64, generator=draw)
    for row in range(5):
        alone = policy.act(
            {k: v[row : row + 1] for k, v in seen.items()}, uniforms[row : row + 1], greedy=False
        )
        torch.testing.assert_close(alone.actions[0], together.actions[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], atol=2e-5, rtol=1e-4)


def test_actions_are_within_the_bounds(config: PolicyConfig) -> None:
    """Also where the sample was far outside; a greedy one is the same every time."""
    policy, seen = trained(config), observed(config, 64)
    for acted in (act(policy, seen), act(policy, seen, greedy=True)):
        if config.discrete:
            assert acted.actions.dtype == torch.int64
            assert 0 <= int(acted.actions.min()) <= int(acted.actions.max()) < config.action
            continue
        assert acted.actions.shape == (64, config.chunk, config.action)
        low, high = torch.tensor(config.low), torch.tensor(config.high)
        assert bool((acted.actions >= low).all())
        assert bool((acted.actions <= high).all())
    greedy = policy.act(seen, torch.zeros(64, policy.draws, dtype=torch.float64), greedy=True)
    assert torch.equal(greedy.actions, acted.actions)


def test_weights_come_from_the_seed_alone(config: PolicyConfig) -> None:
    """And the global random state stays."""
    before = torch.random.get_rng_state()
    first, second = build_policy(config, seed=5), build_policy(config, seed=5)
    other = build_policy(config, seed=6)
    assert torch.equal(before, torch.random.get_rng_state())
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(
        torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_a_short_instruction_is_read_as_if_its_array_were_short() -> None:
    """Padding changes nothing."""
    long = PolicyConfig(**CONFIGS["tokens"])
    short = PolicyConfig(
        **{**CONFIGS["tokens"], "observation": {**CONFIGS["tokens"]["observation"], "text": [4]}}
    )
    policy, narrow = trained(long), build_policy(short, seed=0)
    narrow.load_state_dict(policy.state_dict())
    seen = observed(long, 3)
    seen["text"][:] = 0
    seen["text"][:, :4] = torch.tensor([103, 114, 97, 98], dtype=torch.uint8)
    cut = {**seen, "text": seen["text"][:, :4]}
    torch.testing.assert_close(act(policy, seen).logprobs, act(narrow, cut).logprobs)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_moments_are_those_of_all_rows_at_once(sizes: list[int], seed: int) -> None:
    """However they were cut into batches and ranks, and far from zero."""
    from actors.models.running_moments import RunningMoments

    draw = torch.Generator().manual_seed(seed)
    batches = [100.0 + torch.randn(n, 3, generator=draw, dtype=torch.float64) for n in sizes]
    running = RunningMoments(3)
    for batch in batches:
        halves = batch.split((len(batch) + 1) // 2)  # two ranks
        running.add(torch.stack([running.moments(half) for half in halves]).sum(0))
    rows = torch.cat(batches)
    torch.testing.assert_close(running.mean, rows.mean(0))
    if len(rows) > 1:
        torch.testing.assert_close(
            running.std, rows.std(0, correction=0).clamp(min=1e-4), rtol=1e-5, atol=1e-9
        )
    assert running.normalize(rows).abs().max() <= 10


def test_normals_are_normal() -> None:
    """By the distribution function of another implementation; the ends are finite."""
    uniforms = torch.tensor([0.0, 0.025, 0.5, 0.975, 1 - 2**-53], dtype=torch.float64)
    drawn = normals(uniforms)
    torch.testing.assert_close(
        torch.distributions.Normal(0.0, 1.0).cdf(drawn[1:4]), uniforms[1:4], atol=1e-7, rtol=0
    )
    assert bool(drawn.isfinite().all())


def test_a_squashed_gaussian_has_the_density_of_its_actions() -> None:
    """Against torch's transformed distribution, also where tanh is flat."""
    from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

    from actors.models.distributions import Gaussian

    mean, log_std = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    ours = Gaussian(mean, log_std, squash=True)
    sample = torch.linspace(-6, 6, 14, dtype=torch.float64).view(7, 2)
    theirs = TransformedDistribution(
        Independent(Normal(mean, log_std.exp()), 1), [TanhTransform(cache_size=1)]
    )
    action = theirs.transforms[0](sample)
    torch.testing.assert_close(ours.log_prob(sample), theirs.log_prob(action))
    plain = Gaussian(mean, log_std, squash=False)
    torch.testing.assert_close(
        plain.entropy(sample), Independent(Normal(mean, log_std.exp()), 1).entropy()
    )


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "mlp"}, "kind"),
        ({"observation": {}}, "observation"),
        ({"observation": {"depth": [40, 40, 1]}}, "observation"),
        ({"low": [-1.0]}, "low"),
        ({"low": 1.0}, "low"),
        ({"width": 6}, "width"),
        ({"patch": 7}, "patch"),
        ({"instruction": "joints2"}, "instruction"),
        ({"discrete": True}, "discrete"),
    ],
)
def test_numbers_that_do_not_fit_are_named(change: dict[str, Any], key: str) -> None:
    """Before anything is built."""
    assert broken_rule(PolicyConfig(**CONFIGS["tokens"])) is None
    broken = broken_rule(PolicyConfig(**{**CONFIGS["tokens"], **change}))
    assert broken is not None
    assert broken[0] == key
