"""The several-turn task: answers, ends, shaping, and played games."""

from collections import Counter
from functools import partial
from typing import Any

import pytest

from sim.checker import check
from sim.contract import StepResult, TextObservation
from sim.errors import SimError
from sim.text.guess_number import GuessNumber


def content(observation: TextObservation) -> str:
    (message,) = observation.messages
    assert message.role == "user"
    return message.content


def seed_that_hides(number: int, **options: Any) -> int:
    """A seed whose hidden number is this one, found by losing on purpose."""
    env = GuessNumber(1, max_guesses=1, **options)
    for seed in range(1000):
        env.reset([0], [seed])
        if env.step([0], [""])[0].info["hidden"] == str(number):
            return seed
    raise AssertionError(f"no seed below 1000 hides {number}")


def play(env: GuessNumber, seed: int, guesses: list[str]) -> list[StepResult]:
    env.reset([0], [seed])
    return [env.step([0], [guess])[0] for guess in guesses]


def test_answers_lead_to_the_number() -> None:
    """Higher, lower, then correct: terminated with reward 1, and nothing before."""
    env = GuessNumber(1)
    assert content(env.reset([0], [0])[0]) == "Guess my number from 1 to 15. You have 4 guesses."
    results = play(env, seed_that_hides(11), ["8", "12", "11"])
    assert [content(r.observation) for r in results] == ["higher", "lower", "correct"]
    assert [r.reward for r in results] == [0.0, 0.0, 1.0]
    assert [r.terminated for r in results] == [False, False, True]
    assert not any(r.truncated for r in results)
    assert results[-1].info == {"correct": 1.0, "guesses": 3.0, "hidden": "11"}
    assert "hidden" not in results[0].info


def test_last_guess_truncates_unless_it_is_right() -> None:
    """Truncated after max_guesses; found with the last guess is terminated, never both."""
    seed = seed_that_hides(11)
    lost = play(GuessNumber(1, max_guesses=2), seed, ["1", "2"])[-1]
    assert (lost.terminated, lost.truncated, lost.reward) == (False, True, 0.0)
    assert content(lost.observation) == "higher"
    assert lost.info["hidden"] == "11"
    found = play(GuessNumber(1, max_guesses=2), seed, ["1", "11"])[-1]
    assert (found.terminated, found.truncated, found.reward) == (True, False, 1.0)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        *(
            ("11", "correct"),
            (" 11\n", "correct"),
            ("I guess 11.", "correct"),
            ("8? No: 11!", "correct"),
        ),
        *(("011", "correct"), ("99", "lower"), ("-5", "higher"), ("9-10", "higher")),
        *(("", "not"), ("eleven", "not"), ("11.5", "not"), ("11th", "not"), ("1e1", "not")),
        *(("\u0661\u0661", "not"), ("1" * 9000, "not"), ("\ud800", "not"), ("x" * 10**6, "not")),
    ],
)
def test_reading_of_replies(reply: str, answer: str) -> None:
    """The last whole number is the guess; anything else is told apart and costs a guess."""
    (result,) = play(GuessNumber(1), seed_that_hides(11), [reply])
    expected = "not a number: guess a whole number from 1 to 15" if answer == "not" else answer
    assert content(result.observation) == expected
    assert result.info["guesses"] == 1.0


def test_shaping_pays_for_bits_won() -> None:
    """16 numbers are 4 bits: by hand, each halving is a quarter; repeats win nothing."""
    seed = seed_that_hides(16, low=1, high=16)
    env = GuessNumber(1, high=16, max_guesses=2, shaping=0.5)
    for guesses, bits in [
        (["8", "12"], 2),  # 9..16, then 13..16
        (["8", "8"], 1),
        (["8", "99"], 1),
        (["no", "idea"], 0),
        (["8", "14"], 3),  # 15, 16
        (["8", "15"], 4),  # known, but not said
    ]:
        results = play(env, seed, guesses)
        assert results[0].reward == 0.0
        assert results[1].reward == pytest.approx(0.5 * bits / 4)
        assert results[1].truncated


def test_bisection_always_wins_with_the_default_number_of_guesses() -> None:
    """bit_length(15) = 4 guesses suffice for 15 numbers, and 3 do not."""
    for high in (2, 15, 16, 100):
        games = GuessNumber(1, high=high).conversations(range(200), noise=0.0)
        env = GuessNumber(1, high=high)
        for seed, game in enumerate(games):
            guesses = [message.content for message in game if message.role == "assistant"]
            assert play(env, seed, guesses)[-1].terminated


def test_conversations_are_games_of_this_environment() -> None:
    """Replayed guess by guess they give the same messages; noise makes some of them lose."""
    env = GuessNumber(1, low=-20, high=20)
    lost = 0
    games = env.conversations(range(300), noise=0.3)
    assert games == env.conversations(range(300), noise=0.3)
    for seed, game in enumerate(games):
        assert [message.role for message in game] == ["user", "assistant"] * (len(game) // 2)
        seen = list(env.reset([0], [seed])[0].messages)
        for message in game[1::2]:
            (result,) = env.step([0], [message.content])
            seen += [message, *result.observation.messages]
        assert seen[:-1] == game
        assert result.terminated != result.truncated
        lost += result.truncated
    assert 0 < lost < 150


def test_hidden_numbers_are_uniform() -> None:
    """4,000 seeds over 8 numbers: each near 500 (five standard deviations are 105)."""
    env = GuessNumber(1, low=3, high=10, max_guesses=1)
    counts: Counter[str] = Counter()
    for seed in range(4000):
        counts[str(play(env, seed, [""])[0].info["hidden"])] += 1
    assert sorted(map(int, counts)) == list(range(3, 11))
    assert all(abs(count - 500) < 105 for count in counts.values())


@pytest.mark.parametrize("guess", ["8", "nothing"])
def test_keeps_the_contract(guess: str) -> None:
    """Several turns: same seed, same answers, in any slot and company."""
    make_env = partial(GuessNumber, low=8, high=10, max_guesses=3, shaping=0.25)
    checked = check(make_env, actions=lambda observation: guess, seeds=range(12))
    assert checked.ended == checked.episodes
    assert checked.steps > checked.episodes


def test_step_without_reset_changes_nothing() -> None:
    """The refused call costs the other slot no guess."""
    env = GuessNumber(2)
    env.reset([0], [seed_that_hides(11)])
    with pytest.raises(SimError, match="slot 1 has no episode"):
        env.step([0, 1], ["8", "8"])
    assert env.step([0], ["11"])[0].info["guesses"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 5, "high": 5}, "low = 5, high = 5"),
        ({"high": 10**16}, "15 digits"),
        ({"max_guesses": 0}, "max_guesses = 0"),
        ({"shaping": 1.0}, r"shaping = 1\.0"),
        ({"shaping": float("nan")}, "shaping = nan"),
    ],
)
def test_wrong_arguments_say_the_rule(options: dict[str, Any], message: str) -> None:
    """The value seen and the rule."""
    with pytest.raises(ValueError, match=message):
        GuessNumber(1, **options)
