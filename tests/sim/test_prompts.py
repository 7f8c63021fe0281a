"""The task "text": prompts from files by field, split, order and mixing; rewards by weight and name."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sim.checker import check
from sim.contract import ChatMessage, counted_seed, split_counted_seed
from sim.errors import BadTaskData, SimError
from sim.registry import check_arguments, make
from sim.text.prompts import Prompts
from sim.text.rewards import RewardError

EXACT = [{"function": "exact"}]
ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(40)]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(rows: list[dict[str, Any]] = ROWS, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def source(path: Path, **keys: Any) -> dict[str, Any]:
    return {"path": str(path), **keys}


def asked(env: Prompts, seeds: Any) -> list[str]:
    """The last message of the prompt of each seed."""
    observations = [env.reset([0], [seed])[0] for seed in seeds]
    return [observation.messages[-1].content for observation in observations]


def test_keeps_the_contract(write: Write) -> None:
    """With rewards of several kinds, among them one that runs in a loop."""
    rewards = [*EXACT, {"function": "reward_functions:asks", "weight": 0.1}]
    make_env = partial(Prompts, sources=[source(write())], rewards=rewards)
    checked = check(make_env, actions=lambda observation: "4")
    assert checked.ended == checked.episodes > 0


def test_weighted_sum_and_a_name_for_each(write: Write) -> None:
    """A weight of zero only logs; what a reward says stands under its name."""
    rewards = [
        {"function": "exact", "weight": 2.0},
        {"function": "reward_functions:told", "name": "style", "weight": -0.5},
        {"function": "reward_functions:length", "weight": 0.0},
    ]
    path = write(ROWS[2:3])
    env = Prompts(1, [source(path, name="sums")], rewards)
    env.reset([0], [0])
    (result,) = env.step([0], ["4"])
    assert result.reward == pytest.approx(2.0 - 0.25)
    assert dict(result.info) == {
        "source": "sums",
        "row": f"{path}, line 1",
        "exact": 1.0,
        "style": 0.5,
        "style_first": "4",
        "length": 0.1,
    }
    assert (result.terminated, result.truncated) == (True, False)
    with pytest.raises(SimError, match="slot 0 has no episode"):
        env.step([0], ["4"])
    env.close()


def test_error_in_a_reward_names_the_row(write: Write) -> None:
    """File and line, so that one can look."""
    env = Prompts(1, [source(write())], [{"function": "reward_functions:breaks"}], shuffle=False)
    env.reset([0], [3])
    with pytest.raises(RewardError, match=r"breaks\) on .*rows.jsonl, line 4: ZeroDivisionError"):
        env.step([0], ["4"])


def test_fields_template_and_system(write: Write) -> None:
    """Fields may lie in tables; what a row holds in braces is not replaced again."""
    path = write([{"problem": "{level} {x}?", "meta": {"truth": 7, "level": [1]}, "a.b": "dot"}])
    fields = {"question": "problem", "answer": "meta.truth", "level": "meta.level", "dot": "a.b"}
    env = Prompts(
        1,
        [source(path, fields=fields)],
        EXACT,
        template="{question} at {level} {dot} in {braces}",
        system="Be brief.",
    )
    (observation,) = env.reset([0], [0])
    assert observation.messages == (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="{level} {x}? at [1] dot in {braces}"),
    )
    assert env.step([0], ["7"])[0].reward == 1.0


def test_conversations_are_shown_as_they_are(write: Write) -> None:
    """A system message of their own stays the only one."""
    messages = [
        {"role": "user", "content": "{question}"},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "2 + 2?"},
    ]
    own = [{"role": "system", "content": "Own."}, *messages]
    path = write([{"chat": messages}, {"chat": own}])
    env = Prompts(
        1, [source(path, fields={"messages": "chat"})], EXACT, system="Ours.", shuffle=False
    )
    first, second = (env.reset([0], [seed])[0] for seed in (0, 1))
    assert [m.content for m in first.messages] == ["Ours.", "{question}", "What?", "2 + 2?"]
    assert [m.content for m in second.messages] == ["Own.", "{question}", "What?", "2 + 2?"]


def test_each_row_once_per_epoch(write: Write) -> None:
    """In any order of the calls; another job seed, another order."""
    env = Prompts(1, [source(write())], EXACT)
    everything = sorted(row["question"] for row in ROWS)
    for key in (0, 5):
        for epoch in range(3):
            seeds = [counted_seed(key, index) for index in range(40 * epoch, 40 * (epoch + 1))]
            assert sorted(asked(env, seeds)) == everything
    first = asked(env, range(40))
    assert asked(env, reversed(range(40))) == first[::-1]
    assert asked(env, range(40, 80)) != first
    assert asked(env, [counted_seed(1, index) for index in range(40)]) != first
    again = Prompts(1, [source(write())], EXACT)
    assert asked(again, range(40)) == first


def test_seeds_are_counted_in_range() -> None:
    """Whatever a key's size, a seed keeps within the contract's bounds."""
    assert split_counted_seed(counted_seed(3, 17)) == (3, 17)
    assert counted_seed(2**64 - 1, 2**40 + 1) < 2**63
    assert split_counted_seed(counted_seed(2**64 - 1, 2**40 + 1))[1] == 1


def split_of(path: Path, **keys: Any) -> set[str]:
    """The questions of a split."""
    env = Prompts(1, [source(path)], EXACT, **keys)
    size = len(env._sources[0])
    return set(asked(env, range(size)))


def test_split_is_stable_when_rows_are_appended(write: Write) -> None:
    """No row changes sides, both sides make the whole, another split_seed is another split."""
    rows = [{"question": f"q{n}", "answer": ""} for n in range(400)]
    few = write(rows[:200], "few.jsonl")
    many = write([*reversed(rows), *rows[:5]], "many.jsonl")
    share = {"eval_share": 0.25}
    train, held_out = split_of(few, **share), split_of(few, split="eval", **share)
    assert not train & held_out
    assert train | held_out == {row["question"] for row in rows[:200]} == split_of(few, split="all")
    assert 25 < len(held_out) < 75  # 50 expected, six standard deviations are 37
    assert train <= split_of(many, **share)
    assert held_out <= split_of(many, split="eval", **share)
    assert split_of(few, split="eval", split_seed=1, **share) != held_out


def test_sources_mix_by_weight(write: Write) -> None:
    """Each goes through its own epochs."""
    big = write(ROWS, "big.jsonl")
    small = write([{"question": f"s{n}", "answer": ""} for n in range(10)], "small.jsonl")
    env = Prompts(1, [source(big), source(small, weight=3)], EXACT)
    questions = asked(env, range(200))
    counts = Counter(question.startswith("s") for question in questions)
    assert counts[True] == pytest.approx(150, abs=1)
    of_small = [question for question in questions if question.startswith("s")]
    assert all(len(set(of_small[i : i + 10])) == 10 for i in range(0, 150, 10))


def test_curriculum_by_a_measured_pass_rate(write: Write) -> None:
    """Rows out of the band are left out; the rest goes from easy to hard."""
    rates = [n / 39 for n in range(40)]
    rows = [{**row, "rate": rate} for row, rate in zip(ROWS, rates, strict=True)]
    fields = {"question": "question", "answer": "answer", "pass_rate": "rate"}
    env = Prompts(1, [source(write(rows), fields=fields)], EXACT, pass_rates=[0.2, 0.8], levels=2)
    kept = [row["question"] for row in rows if 0.2 <= row["rate"] <= 0.8]
    questions = asked(env, range(len(kept)))
    half = len(kept) // 2
    assert set(questions[:half]) == set(kept[half:])
    assert set(questions[half:]) == set(kept[:half])
    with pytest.raises(ValueError, match=r"name its field, as in fields = \{pass_rate"):
        Prompts(1, [source(write(rows))], EXACT, levels=2)


def test_examples_for_a_warm_up(write: Write) -> None:
    """The field named "solution"; without one the sentence says what to do."""
    fields = {"question": "question", "answer": "answer", "solution": "answer"}
    env = Prompts(1, [source(write(), fields=fields)], EXACT)
    for seed, (observation, text) in zip((3, 9), env.examples([3, 9]), strict=True):
        assert env.reset([0], [seed]) == [observation]
        assert env.step([0], [text])[0].reward == 1.0
    with pytest.raises(BadTaskData, match=r'a warm-up needs a text as "solution"'):
        Prompts(1, [source(write())], EXACT).examples([0])


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"question": 3, "answer": ""},
            None,
            'line 2: "question" must be a text that is not empty',
        ),
        (
            {"question": "a"},
            None,
            r'line 2: there is no field "answer"; the row has \[.question.\]',
        ),
        ({"m": []}, {"messages": "m"}, 'line 2: "m" must be a list of messages'),
        (
            {"m": [{"role": "bot", "content": ""}]},
            {"messages": "m"},
            "line 2: .* one of system, user",
        ),
        (
            {"m": [{"role": "assistant", "content": "a"}]},
            {"messages": "m"},
            'line 2: "m" must end with a message of "user" or "tool"',
        ),
    ],
)
def test_bad_row_is_told_when_the_task_opens(
    write: Write, row: dict[str, Any], fields: dict[str, str] | None, message: str
) -> None:
    """File, line, and what is wrong with it."""
    good = {**ROWS[0], "m": [{"role": "user", "content": "a"}]}
    keys = {} if fields is None else {"fields": fields}
    with pytest.raises(BadTaskData, match=message):
        Prompts(1, [source(write([good, row]), **keys)], EXACT)


def test_no_rows_left_is_told(write: Write) -> None:
    """With what left them out."""
    with pytest.raises(
        BadTaskData, match=r'no rows are left for split = "eval", eval_share = 0.001'
    ):
        Prompts(1, [source(write(ROWS[:3]))], EXACT, split="eval", eval_share=0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sources": []},
            r"sources = \[\]: give one table or more, each below \[\[env.args.sources",
        ),
        ({"sources": [{}]}, r'sources\[0\] needs "path"'),
        ({"sources": [{"path": "a", "wight": 1}]}, 'takes no "wight": did you mean weight'),
        ({"sources": [{"path": "a", "weight": 0}]}, "weight = 0: it must be more than 0"),
        (
            {"sources": [{"path": "a", "fields": {"answer": "b"}}]},
            'either "question" or "messages"',
        ),
        (
            {"sources": [{"path": "a", "fields": {"question": 1}}]},
            "fields.question = 1: it must be a text",
        ),
        ({"sources": [{"path": "a"}, {"path": "b", "weight": 1e-9}]}, "less than a thousandth"),
        ({"rewards": [{"function": "matches"}]}, "missing a required argument: 'pattern'"),
        ({"rewards": EXACT * 2}, 'the name "exact" twice'),
        ({"template": "no place"}, 'has no "{question}": say where it goes'),
        ({"split": "test"}, 'split = "test": it must be one of train, eval, all'),
        ({"split": "eval"}, "has no rows with eval_share = 0"),
        ({"eval_share": 1.5}, "the rule is 0 <= eval_share < 1"),
        ({"eval_share": "some"}, "eval_share = 'some': it must be a number"),
        ({"pass_rates": [0.9, 0.1]}, "give the lowest and the highest"),
        ({"levels": 0}, "levels >= 1"),
    ],
)
def test_wrong_arguments_are_told_at_submit(change: dict[str, Any], message: str) -> None:
    """Without a look at the files, which may not be there yet."""
    args = {"sources": [{"path": "a.jsonl"}], "rewards": EXACT}
    check_arguments("text", args)
    with pytest.raises(SimError, match=message):
        check_arguments("text", {**args, **change})


def test_made_by_name(write: Write) -> None:
    """As an env actor does it."""
    env = make("text", num_slots=1, args={"sources": [source(write())], "rewards": EXACT})
    assert isinstance(env, Prompts)
    env.close()
