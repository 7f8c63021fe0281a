"""The losses of all algorithms against loops over tokens, identities between them, and finite differences."""

import math
from typing import Any

import pytest
import torch
from algorithm_cases import float64, settings, token_batch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from actors.algorithms import kl, objective, ppo, ratios, registry
from actors.algorithms.config import CHOICES, PAPERS, AlgorithmConfig, broken_rule, scope
from actors.algorithms.contract import TokenBatch

LOGPROB = st.floats(-4, -0.01)
TOKENS = st.lists(
    st.tuples(LOGPROB, LOGPROB, st.floats(-3, 3), st.booleans()), min_size=1, max_size=8
)
Tokens = list[tuple[float, float, float, bool]]


def batch_of(tokens: Tokens, **more: Any) -> TokenBatch:
    """(log-prob, the sampler's, advantage, a new sequence begins) of each token."""
    new = [int(begins) for *_, begins in tokens]
    new[0] = 0
    sequences = torch.tensor(new).cumsum(0).tolist()
    logprobs, behaviour, advantages, _ = zip(*tokens, strict=True)
    count = len(tokens)
    critic = {"values": [0.1] * count, "old_values": [0.0] * count, "returns": [0.5] * count}
    return token_batch(logprobs, behaviour, advantages, sequences, **{**critic, **more})


def gradient(name: str, batch: TokenBatch, **changes: Any) -> Tensor:
    total, _ = registry.find(name).loss(batch, settings(name, **changes))
    (found,) = torch.autograd.grad(total, [batch.logprobs])
    return found


def alike(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-9, atol=1e-12)


def slow_loss(name: str, batch: TokenBatch, config: AlgorithmConfig) -> float:
    """A loop over tokens, with nothing but math."""
    logprobs, behaviour = batch.logprobs.tolist(), batch.behaviour_logprobs.tolist()
    advantages, sequences = batch.advantages.tolist(), batch.sequences.tolist()
    total = 0.0
    for place, advantage in enumerate(advantages):
        mine = [i for i, s in enumerate(sequences) if s == sequences[place]]
        if config.ratio_level == "sequence":
            log_ratio = sum(logprobs[i] - behaviour[i] for i in mine) / len(mine)
        else:
            log_ratio = logprobs[place] - behaviour[place]
        ratio = math.exp(log_ratio)
        if name == "rloo":
            total -= advantage * logprobs[place]
        elif name == "cispo":
            assert config.clip_high is not None
            total -= min(ratio, 1 + config.clip_high) * advantage * logprobs[place]
        else:
            assert config.clip_low is not None
            assert config.clip_high is not None
            bounded = max(min(ratio, 1 + config.clip_high), 1 - config.clip_low)
            importance = 1.0
            if config.proximal == "recomputed":  # the first update: the ratio is one
                importance, ratio, bounded = min(ratio, config.correction_cap), 1.0, 1.0
            total -= importance * min(ratio * advantage, bounded * advantage)
        if PAPERS[name].critic:
            error = max((0.1 - 0.5) ** 2, (min(0.1, config.value_clip) - 0.5) ** 2)
            total += config.value_coefficient * error / 2
    return total


@pytest.mark.parametrize("name", PAPERS)
@given(tokens=TOKENS)
def test_the_loss_is_that_of_a_loop_over_tokens(name: str, tokens: Tokens):
    """Whatever the log-probs, advantages and lengths."""
    config, batch = settings(name), batch_of(tokens)
    total, sums = registry.find(name).loss(batch, config)
    assert total.item() == pytest.approx(slow_loss(name, batch, config), abs=1e-9)
    assert tuple(sums) == registry.find(name).METRICS


@given(tokens=TOKENS)
def test_unclipped_grpo_at_the_first_update_is_reinforce(tokens: Tokens):
    """With a group baseline: the gradient is minus the advantage, as that of RLOO's loss."""
    on_policy = [(new, new, advantage, begins) for new, _, advantage, begins in tokens]
    batch = batch_of(on_policy)
    found = gradient("grpo", batch, clip_low=0.999, clip_high=1e9)
    assert alike(found, -batch.advantages)
    assert alike(found, gradient("rloo", batch))
    assert alike(found, gradient("cispo", batch))


@given(tokens=TOKENS)
def test_gspo_of_answers_of_one_token_is_grpo(tokens: Tokens):
    """The geometric mean of one ratio is that ratio."""
    batch = batch_of([(new, old, advantage, True) for new, old, advantage, _ in tokens])
    clips = {"clip_low": 0.2, "clip_high": 0.3}
    assert alike(gradient("gspo", batch, **clips), gradient("grpo", batch, **clips))


@given(tokens=TOKENS)
def test_chunks_of_one_token_are_tokens(tokens: Tokens):
    """And a chunk of several has one ratio, the product of its tokens'."""
    batch = batch_of(tokens, turns=list(range(len(tokens))))
    assert alike(gradient("grpo", batch, ratio_level="chunk"), gradient("grpo", batch))
    whole = batch_of(tokens, turns=[0] * len(tokens))
    ratio = ratios.policy_ratio(whole, settings(ratio_level="chunk"))
    product = math.exp(
        max(-20.0, min(20.0, sum(new - old for new, old, *_ in tokens)))
    )  # the bound of a log-ratio
    assert ratio.tolist() == pytest.approx([product] * len(tokens))


@given(tokens=TOKENS)
def test_decoupled_ppo_is_ppo_where_the_proximal_policy_is_the_sampler(tokens: Tokens):
    """Then the importance weight is one."""
    behaviour = [old for _, old, *_ in tokens]
    batch = batch_of(tokens, proximal_logprobs=behaviour)
    assert alike(gradient("decoupled_ppo", batch), gradient("ppo", batch))


@given(tokens=TOKENS)
def test_decoupled_ppo_weighs_by_the_proximal_policy(tokens: Tokens):
    """Current and proximal alike: the truncated importance weight times the advantage, and no clipping."""
    batch = batch_of(tokens, proximal_logprobs=[new for new, *_ in tokens])
    weights = [min(math.exp(new - old), 2.0) for new, old, *_ in tokens]
    assert alike(gradient("decoupled_ppo", batch), -float64(weights) * batch.advantages)


def test_the_interpolated_policy_moves_with_age():
    """A fresh token has the current policy's log-prob, one version old the sampler's, two versions half of each."""
    batch = token_batch([-1.0] * 3, [-2.0] * 3, [1.0] * 3, staleness=[0, 1, 2])
    config = settings("decoupled_ppo", proximal="interpolated")
    assert ratios.proximal_logprobs(batch, config).tolist() == [-1.0, -2.0, -1.5]


def test_dual_clip_bounds_the_loss_of_bad_tokens_far_above_one():
    """Ratio 5 and advantage -1: the loss is 3, not 5, and has no gradient; good tokens are as before."""
    batch = token_batch([math.log(5.0)] * 2, [0.0] * 2, [-1.0, 1.0])
    surrogate, cut = objective.clipped(
        batch.logprobs.exp(), batch.advantages, settings("grpo", dual_clip=3.0)
    )
    assert surrogate.tolist() == pytest.approx([-3.0, 1.2])
    assert cut.tolist() == [True, True]
    assert gradient("grpo", batch, dual_clip=3.0).tolist() == [0.0, 0.0]
    assert gradient("grpo", batch).tolist() == pytest.approx([5.0, 0.0])


def test_value_clipping_takes_the_larger_error():
    """Old 0, clip 0.2. Towards a return of 1 a value of 0.5 counts as 0.2; away from it, to -0.5, as itself."""
    errors, clipped = ppo.value_loss(
        float64([0.5, -0.5, 0.1]), float64([0.0] * 3), float64([1.0] * 3), settings("ppo")
    )
    assert errors.tolist() == pytest.approx([0.64 / 2, 2.25 / 2, 0.81 / 2])
    assert clipped.tolist() == [True, False, False]
    plain, clipped = ppo.value_loss(
        float64([0.5]), float64([0.0]), float64([1.0]), settings("ppo", value_clip=0.0)
    )
    assert plain.tolist() == [0.125]
    assert not clipped.any()


def test_importance_weights_are_truncated_and_masked_by_token_and_by_sequence():
    """Ratios 1/4 and 3 in the first sequence, 1 in the second."""
    trained = float64([math.log(0.25), math.log(3.0), 0.0])
    batch = token_batch(trained.clone(), [0.0] * 3, [1.0] * 3, [0, 0, 1])

    def weights(**changes: Any) -> list[float]:
        found, _ = ratios.correction(batch, trained, settings("rloo", **changes))
        return found.tolist()

    assert weights() == [1, 1, 1]
    assert weights(correction="token") == pytest.approx([0.25, 2, 1])
    assert weights(correction="token", correction_cap=0.0) == pytest.approx([0.25, 3, 1])
    assert weights(correction="sequence") == pytest.approx([0.75, 0.75, 1])
    assert weights(mask_level="token") == [0, 0, 1]
    assert weights(mask_level="token", mask_high=4.0) == [0, 1, 1]
    assert weights(mask_level="sequence") == [1, 1, 1]  # the geometric mean is 0.87
    assert weights(mask_level="sequence", mask_low=0.9) == [0, 0, 1]
    assert weights(correction="token", mask_level="token", mask_low=0.0) == [0.25, 0, 1]


POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)


def test_kl_estimates_have_the_means_and_gradients_that_are_written():
    """Exactly, by the sum over all outcomes: k1 and k3 are the KL; k1 and k2 pull like the KL, k3 like the KL the other
    way round, each times the policy's probability."""
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(0)
    exact = (logprobs.exp() * (logprobs - REFERENCE.log())).sum()
    (slope,) = torch.autograd.grad(exact, [logits], retain_graph=True)
    other = (REFERENCE * (REFERENCE.log() - logprobs)).sum()
    (other_slope,) = torch.autograd.grad(other, [logits], retain_graph=True)
    for estimator, mean, pull in (
        ("k1", exact.item(), slope),
        ("k2", float((POLICY * (POLICY / REFERENCE).log().square()).sum() / 2), slope),
        ("k3", exact.item(), other_slope),
    ):
        mean_of = (POLICY * kl.estimate(logprobs, REFERENCE.log(), estimator)).sum()
        assert mean_of.item() == pytest.approx(mean)
        (found,) = torch.autograd.grad(mean_of, [logits], retain_graph=True)
        assert torch.allclose(found, pull)


def test_kl_in_the_reward_has_no_gradient_of_its_own():
    """It comes through the advantages; in the loss it does not touch them."""
    batch = token_batch([-1.0], [-1.0], [0.0], reference_logprobs=[-2.0])
    assert gradient("grpo", batch, kl_coefficient=0.5, kl_place="reward").tolist() == [0.0]
    k3 = 0.5 * (1 - math.exp(-1.0))
    assert gradient("grpo", batch, kl_coefficient=0.5).tolist() == pytest.approx([k3])
    k2 = gradient("grpo", batch, kl_coefficient=0.5, kl_estimator="k2").tolist()
    assert k2 == gradient("grpo", batch, kl_coefficient=0.5, kl_estimator="k1").tolist() == [0.5]


@pytest.mark.parametrize("estimator", CHOICES["kl_estimator"][1:])
@pytest.mark.parametrize("name", ["grpo", "gspo", "ppo", "rloo"])
def test_gradients_agree_with_finite_differences(name: str, estimator: str):
    """Away from the kinks; corrections off, as their weights are constants to the gradient and not to a difference."""
    config = settings(
        name,
        kl_coefficient=0.2,
        kl_estimator=estimator,
        kl_place="loss",
        entropy_coefficient=0.1,
        clip_low=0.3,
        clip_high=0.35,
    )
    torch.manual_seed(0)

    def loss(logprobs: Tensor, entropy: Tensor, values: Tensor) -> Tensor:
        batch = token_batch(
            logprobs,
            [-1.0] * 6,
            [1.0, -2.0, 0.5, 1.0, -1.0, 2.0],
            [0, 0, 1, 1, 1, 2],
            entropy=entropy,
            reference_logprobs=[-1.2] * 6,
            weights=[0.5, 0.5, 0.3, 0.3, 0.3, 1.0],
            values=values,
            old_values=[0.0] * 6,
            returns=[0.4] * 6,
        )
        return registry.find(name).loss(batch, config)[0]

    inputs = (
        -1.0 + 0.2 * torch.randn(6, dtype=torch.float64),
        torch.rand(6, dtype=torch.float64),
        0.5 * torch.randn(6, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(loss, [each.requires_grad_() for each in inputs])


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("new", [-math.inf, -1.0, math.inf])
@pytest.mark.parametrize("old", [-math.inf, -1.0, math.inf])
def test_infinite_log_probs_leave_loss_and_gradient_finite(name: str, new: float, old: float):
    """A token of probability zero under either policy: log-ratios end at ±20, and equal infinities have ratio one."""
    batch = batch_of(
        [(new, old, -1.0, True), (-1.0, -1.1, 1.0, False)], reference_logprobs=[old, -1]
    )
    found, sums = registry.find(name).loss(
        batch,
        settings(
            name,
            kl_coefficient=0.1,
            kl_place="loss",
            **({"correction": "sequence"} if name in ("rloo", "decoupled_ppo") else {}),
        ),
    )
    (slope,) = torch.autograd.grad(found, [batch.logprobs])
    assert math.isfinite(found.item())
    assert slope.isfinite().all()
    assert all(math.isfinite(float(value)) for value in sums.values())


@pytest.mark.parametrize("name", PAPERS)
def test_no_tokens_give_a_loss_of_zero(name: str):
    """And metrics of zero."""
    empty: list[float] = []
    batch = token_batch(empty, empty, empty, [], values=empty, old_values=empty, returns=empty)
    total, sums = registry.find(name).loss(batch, settings(name))
    assert total.item() == 0
    assert not any(float(value) for value in sums.values())


def test_scopes_follow_from_what_advantages_are_made_of():
    """The trainer streams all but "batch"."""
    scopes = {name: scope(settings(name)) for name in PAPERS}
    batch = ("reinforce_pp", "reinforce_pp_baseline", "ppo", "decoupled_ppo")
    assert scopes == {name: "batch" if name in batch else "group" for name in PAPERS}
    assert scope(AlgorithmConfig(normalization="batch")) == "batch"
    assert scope(AlgorithmConfig(name="ppo", normalization="none")) == "sample"


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"name": "ppo", "normalization": "group"}, "normalization", "compares no samples"),
        ({"dual_clip": 0.5}, "dual_clip", "more than 1"),
        ({"correction": "token"}, "correction", 'set proximal = "recomputed"'),
        ({"name": "rloo", "proximal": "recomputed"}, "proximal", "leave it out"),
        (
            {"overlong_max_tokens": 3, "overlong_cache_tokens": 5},
            "overlong_max_tokens",
            "use more",
        ),
        ({"filter_range": (0.9, 0.1)}, "filter_range", "lowest mean comes first"),
        ({"filter_key": "correct"}, "filter_key", "give the range too"),
    ],
)
def test_knobs_that_do_not_go_together_are_told(changes: dict[str, Any], key: str, said: str):
    """The key, and the way out; what each paper has is in order."""
    broken = broken_rule(AlgorithmConfig(**changes))
    assert broken is not None
    assert broken[0] == key
    assert said in broken[1]
    assert all(broken_rule(AlgorithmConfig(name=name)) is None for name in PAPERS)
