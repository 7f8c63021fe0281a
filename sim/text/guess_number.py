"""Guess a hidden number: a conversation of several turns that a very small model can learn."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sim.contract import ChatMessage, StepResult, TextObservation
from sim.errors import SimError

PROMPT = "Guess my number from {low} to {high}. You have {guesses} guesses."

WHOLE_NUMBER = re.compile(r"(?<![\w.])-?[0-9]++(?!\.?\w)")
MAX_REPLY = 1024  # characters at the end of a reply that are read
MAX_DIGITS = 15  # so that 53 random bits draw every number of the range


@dataclass(slots=True)
class _Game:
    """One episode. lowest, highest: what the answers so far leave possible, both included."""

    hidden: int
    lowest: int
    highest: int
    guesses: int = 0


class GuessNumber:
    """Several turns: the reply to each guess is "higher", "lower" or "correct".

    num_slots: episodes hosted at the same time
    low, high: the hidden number is drawn uniformly from low to high, both included
    max_guesses: the episode is truncated when so many did not find it; None is what bisection needs
        at worst (4 for 15 numbers). The job's [env] max_turns must not be smaller.
    shaping: reward of an episode that did not find the number, times the share of the bits of the
        range that its guesses won: 0 with nothing ruled out, 1 with one number left. It is below 1,
        so that finding the number is always best; 0 gives none. A model that cannot find the
        number yet is paid for sensible guesses, and for each halving the same.
    prompt: the first message, with {low}, {high} and {guesses} replaced

    The hidden number is a pure function of the seed. The last whole number of a reply is the guess;
    a reply without one is answered "not a number" and counts as a guess. A guess out of range is
    answered like any other. The reward comes at the end: 1 when found. `info` has `correct` (1 or 0
    so far), `guesses`, and at the end `hidden`.

    ValueError: an argument breaks a rule.
    """

    def __init__(
        self,
        num_slots: int,
        low: int = 1,
        high: int = 15,
        *,
        max_guesses: int | None = None,
        shaping: float = 0.0,
        prompt: str = PROMPT,
    ) -> None:
        if not -(10**MAX_DIGITS) < low < high < 10**MAX_DIGITS:
            raise ValueError(
                f"low = {low}, high = {high}: the rule is low < high, {MAX_DIGITS} digits at most"
            )
        if max_guesses is not None and max_guesses < 1:
            raise ValueError(f"max_guesses = {max_guesses}: allow at least 1")
        if not 0 <= shaping < 1:
            raise ValueError(f"shaping = {shaping}: the rule is 0 <= shaping < 1")
        self._low = low
        self._high = high
        self._max_guesses = max_guesses or (high - low + 1).bit_length()
        self._shaping = shaping
        for name, value in (("low", low), ("high", high), ("guesses", self._max_guesses)):
            prompt = prompt.replace(f"{{{name}}}", str(value))
        self._prompt = prompt
        self._games: list[_Game | None] = [None] * num_slots

    def reset(self, slots: Sequence[int], seeds: Sequence[int]) -> list[TextObservation]:
        """Start a game in each slot."""
        observations = []
        for slot, seed in zip(slots, seeds, strict=True):
            self._games[slot] = self._game(seed)
            observations.append(_say(self._prompt))
        return observations

    def step(self, slots: Sequence[int], actions: Sequence[str]) -> list[StepResult]:
        """Answer one guess per slot. SimError: a slot has no game; nothing is changed."""
        games = [self._game_of(slot) for slot in slots]
        results = []
        for slot, game, action in zip(slots, games, actions, strict=True):
            result = self._answer(game, action)
            if result.terminated or result.truncated:
                self._games[slot] = None
            results.append(result)
        return results

    def close(self) -> None:
        """Nothing to free."""

    def conversations(self, seeds: Sequence[int], noise: float = 0.2) -> list[list[ChatMessage]]:
        """Played games for a supervised warm-up: each begins with the prompt, ends with a guess.

        Each guess is the middle of what is left or, with probability `noise`, any number of what is
        left, so that a model sees answers it would not meet in perfect play. Some games of noisy
        play run out of guesses. A game is a pure function of the seed and `noise`.
        """
        return [self._play(seed, noise) for seed in seeds]

    def _play(self, seed: int, noise: float) -> list[ChatMessage]:
        game = self._game(seed)
        draw = random.Random(f"play {seed}").random  # not the draws that hide the number
        messages = [*_say(self._prompt).messages]
        while True:
            guess = (game.lowest + game.highest) // 2
            if draw() < noise:
                guess = game.lowest + int(draw() * (game.highest - game.lowest + 1))
            messages.append(ChatMessage(role="assistant", content=str(guess)))
            result = self._answer(game, str(guess))
            if result.terminated or result.truncated:
                return messages
            messages.extend(result.observation.messages)

    def _game(self, seed: int) -> _Game:
        size = self._high - self._low + 1
        hidden = self._low + int(random.Random(seed).random() * size)
        return _Game(hidden=hidden, lowest=self._low, highest=self._high)

    def _game_of(self, slot: int) -> _Game:
        game = self._games[slot]
        if game is None:
            raise SimError(f"slot {slot} has no episode (ended or never begun): reset it first")
        return game

    def _answer(self, game: _Game, action: str) -> StepResult:
        guess = _read_guess(action)
        game.guesses += 1
        found = guess == game.hidden
        if guess is None:
            answer = f"not a number: guess a whole number from {self._low} to {self._high}"
        elif found:
            answer = "correct"
        elif guess < game.hidden:
            answer = "higher"
            game.lowest = max(game.lowest, guess + 1)
        else:
            answer = "lower"
            game.highest = min(game.highest, guess - 1)
        out_of_guesses = not found and game.guesses >= self._max_guesses
        info: dict[str, float | str] = {"correct": float(found), "guesses": float(game.guesses)}
        if found or out_of_guesses:
            info["hidden"] = str(game.hidden)
        return StepResult(
            observation=_say(answer),
            reward=1.0 if found else self._shaping * self._bits_won(game) * out_of_guesses,
            terminated=found,
            truncated=out_of_guesses,
            info=info,
        )

    def _bits_won(self, game: _Game) -> float:
        """The share, from 0 to 1, of the bits that name one number of the range."""
        left = math.log2(game.highest - game.lowest + 1)
        return 1.0 - left / math.log2(self._high - self._low + 1)


def _read_guess(reply: str) -> int | None:
    """The last whole number of a reply in ASCII digits; None where there is none, or too long."""
    numbers = WHOLE_NUMBER.findall(reply[-MAX_REPLY:])
    if not numbers or len(numbers[-1]) > MAX_DIGITS + 1:
        return None
    return int(numbers[-1])


def _say(text: str) -> TextObservation:
    return TextObservation(messages=(ChatMessage(role="user", content=text),))
