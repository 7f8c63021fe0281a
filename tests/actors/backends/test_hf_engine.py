"""Continuous batching against one sequence at a time, without a cache.

Most tests run in float64: there a draw never falls between the cumulative sums of two ways to compute
the same logits, so tokens must be equal. (In float32 it does, about once in ten thousand tokens.)
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from actors.backends.contract import Generation, GenerationRequest
from actors.backends.hf_engine import HFGenerationEngine
from actors.backends.sampling import Sampler, as_int64
from actors.episodes import Sampling
from actors.randomness import fold

VOCABULARY = 40
CONTEXT = 48
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough for the model to have preferences: a wrong cache must show in the log-probs.
    "initializer_range": 0.3,
}
GPT2_SHAPE = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen2-eager": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, attn_implementation="eager")),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    # Its logits pass a soft cap after the language-model head.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8)
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE)),
}


def build(name: str = "qwen2", seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]().eval().double()


def build_engine(model: Any, **changes: Any) -> HFGenerationEngine:
    settings = {"max_running": 8, "max_context_tokens": CONTEXT, "pad_token": 0, **changes}
    return HFGenerationEngine(model, **{"dtype": torch.float64, **settings})


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def request(request_id: int, context: Sequence[int] | None = None, **changes: Any):
    """A request with a random context, 3 to 20 tokens long, unless one is given."""
    if context is None:
        rng = np.random.default_rng(request_id)
        context = rng.integers(3, VOCABULARY, size=rng.integers(3, 21)).tolist()
    settings = {"max_new_tokens": 12, "key": fold(99, request_id), "stop_tokens": (5,), **changes}
    return GenerationRequest(
        request_id=request_id, context=np.array(context, dtype=np.int32), **settings
    )


@torch.no_grad()
def reference(
    model: Any, wanted: GenerationRequest, max_context_tokens: int = CONTEXT
) -> Generation:
    """One sequence alone, every token by a whole forward pass without a cache."""
    tokens, logprobs = wanted.sampled.tolist(), wanted.sampled_logprobs.tolist()
    context = wanted.context.tolist()
    key = torch.tensor([as_int64(wanted.key)])
    sampler = Sampler([wanted.sampling], VOCABULARY, torch.device("cpu"))
    finish = "length"
    while len(tokens) < wanted.max_new_tokens and len(context) + len(tokens) < max_context_tokens:
        ids = torch.tensor([context + tokens])
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        token, logprob = sampler(logits, key, torch.tensor([len(tokens)]))
        tokens.append(int(token))
        logprobs.append(float(logprob))
        if tokens[-1] in wanted.stop_tokens:
            finish = "stop"
            break
    return Generation(
        request_id=wanted.request_id,
        tokens=np.array(tokens, dtype=np.int32),
        logprobs=np.array(logprobs, dtype=np.float32),
        versions=np.full(len(tokens), -1, dtype=np.int32),
        finish=finish,
    )


def assert_same(got: Generation, expected: Generation, atol: float = 1e-6) -> None:
    assert got.request_id == expected.request_id
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.finish == expected.finish
    np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=0, atol=atol)
    assert (got.tokens.dtype, got.logprobs.dtype, got.versions.dtype) == (
        np.int32,
        np.float32,
        np.int32,
    )


def run_to_end(
    engine: HFGenerationEngine, requests: Sequence[GenerationRequest] = ()
) -> dict[int, Generation]:
    """Feed requests as they find room, and step until all have ended."""
    waiting, ended = list(requests), {}
    while waiting or engine.num_running:
        while waiting and engine.can_admit(waiting[0]):
            engine.add(waiting.pop(0))
        for generation in engine.step():
            assert generation.request_id not in ended
            ended[generation.request_id] = generation
    return ended


@pytest.mark.parametrize("name", list(MODELS))
def test_staggered_arrivals_give_what_each_gives_alone(name: str):
    """20 requests through 8 rows, some arriving late: rows come, end, move and are reused."""
    model = build(name)
    engine = build_engine(model)
    requests = [request(i, max_new_tokens=1 + i % 14) for i in range(20)]
    ended = run_to_end(engine, requests)
    assert set(ended) == set(range(20))
    for one in requests:
        assert_same(ended[one.request_id], reference(model, one))


def test_rows_with_different_sampling_share_a_batch():
    """Greedy, top-k, windowed and hot rows side by side are each as they would be alone."""
    model = build()
    samplings = [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=1.6, top_k=4),
        Sampling(vocabulary=(6, 19)),
        Sampling(temperature=0, vocabulary=(3, 9)),
    ]
    requests = [request(i, sampling=samplings[i % 5]) for i in range(12)]
    ended = run_to_end(build_engine(model), requests)
    for one in requests:
        assert_same(ended[one.request_id], reference(model, one))


def test_a_context_of_one_token_needs_no_prefill():
    """Its only token goes straight through decode."""
    model = build()
    ended = run_to_end(build_engine(model), [request(1, [7]), request(2)])
    assert_same(ended[1], reference(model, request(1, [7])))


def test_members_of_a_group_share_their_prompt_but_not_their_draws():
    """Equal contexts are prefilled once; each row then goes its own way."""
    model = build()
    requests = [request(i, [9, 8, 7, 6, 9, 8], stop_tokens=()) for i in range(6)]
    requests.append(request(6, [9, 8, 7, 6, 9, 3], stop_tokens=()))
    ended = run_to_end(build_engine(model), requests)
    for one in requests:
        assert_same(ended[one.request_id], reference(model, one))
    assert len({ended[i].tokens.tobytes() for i in range(6)}) == 6


def test_a_prefill_beyond_the_budget_is_split(monkeypatch: pytest.MonkeyPatch):
    """Few tokens at a time give the same as all at once."""
    monkeypatch.setattr("actors.backends.hf_lane.PREFILL_TOKENS", 24)
    model = build()
    requests = [request(i) for i in range(8)]
    ended = run_to_end(build_engine(model), requests)
    for one in requests:
        assert_same(ended[one.request_id], reference(model, one))


def test_sequences_end_where_the_context_is_full():
    """One that reaches max_context_tokens ends with "length", one that came full at once."""
    model = build()
    engine = build_engine(model, max_context_tokens=16)
    rng = np.random.default_rng(4)
    contexts = [rng.integers(6, VOCABULARY, size=n).tolist() for n in (10, 15, 16)]
    requests = [request(i, c, stop_tokens=()) for i, c in enumerate(contexts)]
    ended = run_to_end(engine, requests)
    assert [len(ended[i].tokens) for i in range(3)] == [6, 1, 0]
    assert {ended[i].finish for i in range(3)} == {"length"}
    assert_same(ended[0], reference(model, requests[0], max_context_tokens=16))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_aborted_request_resumes_where_it_was(steps: int):
    """Abort some, resume them elsewhere with what they had: all end as if undisturbed."""
    model = build()
    requests = [request(i, max_new_tokens=10, stop_tokens=()) for i in range(8)]
    first, second = build_engine(model), build_engine(build())
    for one in requests:
        first.add(one)
    for _ in range(steps):
        assert first.step() == []
    aborted = first.abort([1, 4, 6, 777])
    assert sorted(g.request_id for g in aborted) == [1, 4, 6]
    assert all(g.finish == "aborted" and len(g.tokens) == steps for g in aborted)
    assert first.num_running == 5
    resumed = [
        replace(
            requests[g.request_id],
            sampled=g.tokens,
            sampled_logprobs=g.logprobs,
            sampled_versions=g.versions,
        )
        for g in aborted
    ]
    ended = {**run_to_end(second, resumed), **run_to_end(first)}
    for one in requests:
        assert_same(ended[one.request_id], reference(model, one))


def test_what_had_ended_before_it_was_resumed_comes_back_as_it_is():
    """A last token that stops, or a full count of tokens, is not sampled past."""
    engine = build_engine(build())
    past = {"sampled_logprobs": np.zeros(2, np.float32), "sampled_versions": np.zeros(2, np.int32)}
    stopped = request(1, sampled=np.array([9, 5], np.int32), **past)
    full = request(2, sampled=np.array([9, 9], np.int32), max_new_tokens=2, **past)
    engine.add(stopped)
    engine.add(full)
    ended = {g.request_id: g for g in engine.step()}
    assert [ended[i].finish for i in (1, 2)] == ["stop", "length"]
    assert ended[1].tokens.tolist() == [9, 5]
    assert engine.num_running == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_new_weights_in_mid_generation_are_used_from_the_next_token(in_place: bool):
    """Tokens so far and their versions stay; the rest is what the new weights say after them."""
    old, new = build(seed=0), build(seed=1)
    engine = build_engine(build(seed=0))
    engine.load_weights(7, weights_of(old))
    assert engine.version == 7
    requests = [request(i, stop_tokens=(), max_new_tokens=4 + i % 5) for i in range(8)]
    for one in requests:
        engine.add(one)
    ended = {g.request_id: g for _ in range(3) for g in engine.step()}
    if in_place:
        for name, tensor in engine.weights_in_place().items():
            tensor.copy_(weights_of(new)[name])
        engine.weights_replaced(9)
    else:
        engine.load_weights(9, weights_of(new))
    ended |= run_to_end(engine)
    for one in requests:
        before = reference(old, replace(one, max_new_tokens=3))
        after = reference(
            new, replace(one, sampled=before.tokens, sampled_logprobs=before.logprobs)
        )
        assert_same(ended[one.request_id], after)
        versions = [7] * 3 + [9] * (one.max_new_tokens - 3)
        assert ended[one.request_id].versions.tolist() == versions


def test_an_aborted_row_leaves_the_others_right_after_new_weights():
    """Rows that move between a change of weights and the next step are prefilled in their place."""
    new = build(seed=1)
    engine = build_engine(build(seed=0))
    requests = [request(i, stop_tokens=()) for i in range(6)]
    for one in requests:
        engine.add(one)
    engine.step()
    engine.load_weights(1, weights_of(new))
    first = {g.request_id: g for g in engine.abort([0, 2])}
    assert set(first) == {0, 2}
    engine.add(request(10, stop_tokens=()))
    ended = run_to_end(engine)
    assert_same(ended[10], reference(new, request(10, stop_tokens=())))
    one = requests[3]
    before = reference(build(seed=0), replace(one, max_new_tokens=1))
    after = reference(new, replace(one, sampled=before.tokens, sampled_logprobs=before.logprobs))
    assert_same(ended[3], after)


def batch_of(number: int, ids: range, **changes: Any) -> list[GenerationRequest]:
    return [request(i, batch=number, max_new_tokens=3 + i % 7, **changes) for i in ids]


def test_a_fixed_batch_is_the_same_to_the_last_bit_in_any_company():
    """Alone, in another order, beside other requests, after another batch: identical log-probs."""
    batch = batch_of(1, range(5))
    settings = {"max_running": 32, "dtype": torch.float32}
    alone = run_to_end(build_engine(build(), **settings), batch)
    engine = build_engine(build(), **settings)
    others = [request(100 + i, max_new_tokens=20, stop_tokens=()) for i in range(9)]
    for one in others[:5]:
        engine.add(one)
    ended = {g.request_id: g for _ in range(2) for g in engine.step()}
    for one in [*batch_of(2, range(50, 53)), *batch[::-1], *others[5:]]:
        engine.add(one)
    ended |= run_to_end(engine)

    for number, generation in alone.items():
        assert ended[number].tokens.tolist() == generation.tokens.tolist()
        assert ended[number].logprobs.tobytes() == generation.logprobs.tobytes()


def test_a_fixed_batch_gives_what_each_member_gives_alone():
    """Idle rows beside them change nothing but the last bits."""
    model = build()
    batch = batch_of(1, range(6))
    ended = run_to_end(build_engine(model), [*batch, *(request(20 + i) for i in range(2))])
    for one in [*batch, request(20), request(21)]:
        assert_same(ended[one.request_id], reference(model, one))


def test_an_idle_row_stays_where_it_ended():
    """It would otherwise run out of its memory and into its neighbours', long after it ended."""
    model = build()
    rng = np.random.default_rng(1)
    contexts = [rng.integers(6, VOCABULARY, size=n).tolist() for n in (3, 20, 4)]
    batch = [
        request(i, context, batch=1, key=i, max_new_tokens=new, stop_tokens=())
        for i, (context, new) in enumerate(zip(contexts, (40, 1, 40), strict=True))
    ]
    ended = run_to_end(build_engine(model), batch)
    for one in batch:
        assert_same(ended[one.request_id], reference(model, one))


def test_the_rows_of_a_fixed_batch_do_not_depend_on_the_order_of_arrival():
    """Concurrent episodes arrive in any order; the batch is the same batch."""
    orders = []
    for reverse in (False, True):
        engine = build_engine(build())
        for one in sorted(batch_of(1, range(5)), key=lambda r: r.request_id, reverse=reverse):
            engine.add(one)
        engine.step()
        orders.append([one.request_id for one in engine._batch_lane.rows.requests])
    assert orders[0] == orders[1]


def test_new_weights_in_the_middle_of_a_fixed_batch():
    """Its rows, the ended ones too, are prefilled again in their places."""
    old, new = build(seed=0), build(seed=1)
    engine = build_engine(build(seed=0))
    batch = [replace(one, stop_tokens=()) for one in batch_of(1, range(5))]
    for one in batch:
        engine.add(one)
    ended = {g.request_id: g for _ in range(4) for g in engine.step()}
    assert 0 < len(ended) < 5
    engine.load_weights(1, weights_of(new))
    ended |= run_to_end(engine)
    for one in batch:
        before = reference(old, replace(one, max_new_tokens=min(4, one.max_new_tokens)))
        after = reference(
            new, replace(one, sampled=before.tokens, sampled_logprobs=before.logprobs)
        )
        assert ended[one.request_id].tokens.tolist() == after.tokens.tolist()
        np.testing.assert_allclose(ended[one.request_id].logprobs, after.logprobs, atol=1e-6)


def test_the_rows_of_a_fixed_batch_stay_taken_until_all_have_ended():
    """Idle rows hold their slots; they are free when the batch is done."""
    engine = build_engine(build(), max_running=4)
    for one in batch_of(3, range(4), stop_tokens=()):
        engine.add(one)
    while engine.num_running == 4:
        engine.step()
    assert 0 < engine.num_running < 4
    assert engine.free_slots == 0
    assert not engine.can_admit(request(9))
    run_to_end(engine)
    assert engine.free_slots == 4


def test_a_batch_that_has_begun_takes_no_more_requests():
    """Its composition is what was added before the step."""
    engine = build_engine(build())
    engine.add(request(1, batch=5))
    engine.step()
    with pytest.raises(ValueError, match="batch 5 has begun; add all requests of a batch before"):
        engine.add(request(2, batch=5))
    engine.abort()
    engine.add(request(2, batch=5))
    assert set(run_to_end(engine)) == {2}


def test_abort_takes_requests_wherever_they_are():
    """Waiting, in an open batch, in a waiting batch, running: all come back, none is left."""
    engine = build_engine(build(), max_running=16)
    for one in [request(1), *batch_of(1, range(2, 4))]:
        engine.add(one)
    engine.step()
    for one in [request(4), *batch_of(2, range(5, 7))]:
        engine.add(one)
    engine.step()
    for one in [request(7), *batch_of(3, range(8, 10))]:
        engine.add(one)
    aborted = {g.request_id: len(g.tokens) for g in engine.abort()}
    assert aborted == {1: 2, 2: 2, 3: 2, 4: 1, 5: 0, 6: 0, 7: 0, 8: 0, 9: 0}
    assert engine.num_running == 0
    assert engine.free_slots == 16
    assert engine.step() == []


def test_the_cache_grows_with_what_runs_and_is_dropped_by_offload():
    """A short job does not hold max_running x max_context_tokens."""
    model = build()
    engine = build_engine(model, max_running=1024, max_context_tokens=64)
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert engine.memory_bytes() == weights
    run_to_end(engine, [request(i, [4, 5, 6, 7], max_new_tokens=4) for i in range(3)])
    per_token = 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, head width, bytes
    assert engine.memory_bytes() == weights + 4 * 16 * per_token
    run_to_end(engine, [request(i, max_new_tokens=30) for i in range(9)])
    assert weights < engine.memory_bytes() <= weights + 16 * 64 * per_token
    before = run_to_end(engine, [request(1)])[1]
    engine.offload()
    assert engine.memory_bytes() == weights
    with pytest.raises(ValueError, match=r"offloaded; call onload\(\) first"):
        engine.add(request(1))
    engine.onload()
    assert_same(run_to_end(engine, [request(1)])[1], before, atol=0)


def test_offload_needs_an_empty_engine():
    engine = build_engine(build())
    engine.add(request(1))
    with pytest.raises(ValueError, match=r"offload with 1 sequences inside: abort\(\) them first"):
        engine.offload()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(1, []), "its context is empty, .* begin with a"),
        (request(1, [3] * 49), "its 49 tokens are more than max_context_tokens = 48; shorten"),
        (request(1, [3, 40]), r"context has token 40, outside the vocabulary \[0, 40\); use"),
        (request(1, [3, -1]), r"context has token -1, outside the vocabulary \[0, 40\); use"),
        (request(1, max_new_tokens=0), "max_new_tokens = 0; ask for at least 1"),
        (request(1, sampling=Sampling(temperature=-1)), "temperature = -1, .* 0 is greedy"),
        (
            request(1, sampling=Sampling(vocabulary=(3, 41))),
            r"its vocabulary window \[3, 41\) is no part of",
        ),
        (request(1, sampled=np.array([3], np.int32)), "1 sampled tokens come with 0 log-probs"),
    ],
)
def test_requests_that_could_never_run_are_refused(wrong: GenerationRequest, message: str):
    """Before they are admitted, with the value, the rule and the way out."""
    engine = build_engine(build())
    for call in (engine.can_admit, engine.add):
        with pytest.raises(ValueError, match=f"request 1: {message}"):
            call(wrong)
    assert engine.num_running == 0


def test_requests_beyond_the_slots_or_twice_are_refused():
    engine = build_engine(build(), max_running=2)
    engine.add(request(1))
    with pytest.raises(ValueError, match="request 1 is in the engine already"):
        engine.add(request(1))
    engine.add(request(2))
    assert not engine.can_admit(request(3))
    with pytest.raises(ValueError, match=r"all 2 slots are taken; ask can_admit\(\) first"):
        engine.add(request(3))


def test_weights_that_do_not_fit_change_nothing():
    """Missing, unexpected and misshapen parameters are named; the old weights stay."""
    engine, model = build_engine(build(seed=0)), build(seed=0)
    wrong = weights_of(build(seed=1))
    del wrong["model.norm.weight"]
    wrong["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(5)
    wrong["model.norm.wieght"] = torch.zeros(32)
    with pytest.raises(ValueError, match="weights do not fit Qwen2ForCausalLM") as error:
        engine.load_weights(3, wrong)
    for part in (
        "model.norm.wieght is no parameter of the model",
        "model.layers.0.self_attn.q_proj.bias has shape [5] where the model has [32]",
        "model.norm.weight is missing",
    ):
        assert part in str(error.value)
    assert engine.version == -1
    assert_same(run_to_end(engine, [request(1)])[1], reference(model, request(1)))


def test_tied_weights_are_given_once_under_either_name():
    """Giving both is refused: they could differ."""
    new = build(seed=1)
    weights = weights_of(new)
    assert "lm_head.weight" not in weights
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        renamed = {
            name if key == "model.embed_tokens.weight" else key: value
            for key, value in weights.items()
        }
        engine = build_engine(build(seed=0))
        engine.load_weights(1, renamed)
        assert_same(run_to_end(engine, [request(1)])[1], reference(new, request(1)))
    both = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    with pytest.raises(ValueError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        engine.load_weights(2, both)


def test_weights_that_are_not_finite_stop_the_engine_with_a_reason():
    model = build()
    engine = build_engine(model)
    broken = weights_of(model)
    broken["model.norm.weight"][0] = float("nan")
    engine.load_weights(12, broken)
    engine.add(request(1))
    with pytest.raises(FloatingPointError, match="not finite in 1 of 1 sequences at policy versi"):
        engine.step()


def test_good_weights_after_broken_ones_find_a_clean_cache():
    """NaN left in the cache must not reach masked positions of later rows."""
    model = build()
    engine = build_engine(build())
    broken = {name: torch.full_like(w, float("nan")) for name, w in weights_of(model).items()}
    engine.load_weights(1, broken)
    engine.add(request(1))
    with pytest.raises(FloatingPointError):
        engine.step()
    engine.abort()
    engine.load_weights(2, weights_of(model))
    assert_same(run_to_end(engine, [request(2)])[2], reference(model, request(2)))


def assert_logprobs_of_its_own_tokens(
    engine: HFGenerationEngine,
    requests: Sequence[GenerationRequest],
    *,
    model: Any,
    atol: float,
) -> None:
    """Compare the engine's log-probs with those of one forward of `model` over the same tokens."""
    ended = run_to_end(engine, requests)
    for one in requests:
        generation, first = ended[one.request_id], len(one.context)
        context = torch.tensor([one.context.tolist() + generation.tokens.tolist()])
        with torch.no_grad():
            logprobs = model(input_ids=context, use_cache=False).logits[0].double().log_softmax(-1)
        exact = logprobs[first - 1 : -1].gather(1, context[0, first:, None]).squeeze(1)
        np.testing.assert_allclose(generation.logprobs, exact, rtol=0, atol=atol)


def test_float32_logprobs_are_exact_to_five_digits():
    engine = build_engine(build(), dtype=torch.float32)
    requests = [request(i) for i in range(40)]
    assert_logprobs_of_its_own_tokens(engine, requests, model=build().float(), atol=1e-5)


def test_bfloat16_logprobs_are_near():
    """Logits here reach 15, where bfloat16 has a resolution of 0.06."""
    engine = build_engine(build(), dtype=torch.bfloat16)
    requests = [request(i) for i in range(40)]
    assert_logprobs_of_its_own_tokens(engine, requests, model=build(), atol=0.3)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="max_context_tokens = 65 is beyond the model's 64"):
        build_engine(build(), max_context_tokens=65)
    with pytest.raises(ValueError, match=r"pad_token = 40 is outside the vocabulary \[0, 40\)"):
        build_engine(build(), pad_token=40)
    with pytest.raises(ValueError, match="max_running = 0"):
        build_engine(build(), max_running=0)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


GPU_ATOL = 5e-6  # a few float32 roundings: exponentials and sums differ between a GPU and a CPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", list(MODELS))
def test_gpu_gives_what_the_cpu_gives(name: str):
    """Rows come, end, move and are reused on the device as on the host."""
    engine = build_engine(build(name), device="cuda")
    requests = [request(i, max_new_tokens=1 + i % 14) for i in range(20)]
    ended = run_to_end(engine, requests)
    model = build(name)
    for one in requests:
        assert_same(ended[one.request_id], reference(model, one), atol=GPU_ATOL)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_gpu_logprobs_in_lower_precision(dtype: torch.dtype, atol: float):
    """The fused attention kernels, which float64 does not use."""
    engine = build_engine(build(), device="cuda", dtype=dtype)
    requests = [request(i) for i in range(40)]
    assert_logprobs_of_its_own_tokens(engine, requests, model=build(), atol=atol)


@pytest.mark.gpu
@needs_gpu
def test_gpu_memory_leaves_with_offload_and_weights_come_back():
    """Offloaded, nothing of the engine is on the device; new weights may be loaded meanwhile."""
    engine = build_engine(build(seed=0), device="cuda")
    run_to_end(engine, [request(1)])
    held = engine.memory_bytes()
    allocated = torch.cuda.memory_allocated()
    assert 0 < held <= allocated
    engine.offload()
    assert engine.memory_bytes() == 0
    assert torch.cuda.memory_allocated() <= allocated - held
    new = build(seed=1)
    engine.load_weights(4, weights_of(new))
    engine.onload()
    ended = run_to_end(engine, [request(1)])
    assert_same(ended[1], reference(new, request(1)), atol=GPU_ATOL)
    assert set(ended[1].versions) == {4}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_fixed_batches_are_the_same_to_the_last_bit(dtype: torch.dtype):
    batch = batch_of(1, range(5))
    settings = {"max_running": 32, "device": "cuda", "dtype": dtype}
    alone = run_to_end(build_engine(build(), **settings), batch)
    others = [request(100 + i, max_new_tokens=20) for i in range(9)]
    together = run_to_end(build_engine(build(), **settings), [*others, *batch])
    for number, generation in alone.items():
        assert together[number].tokens.tolist() == generation.tokens.tolist()
        assert together[number].logprobs.tobytes() == generation.logprobs.tobytes()
