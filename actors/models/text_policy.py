"""Between messages and tokens: what a text policy's model reads, and what its tokens say.

Messages become tokens once. A later turn appends to the history and never touches it, so what the
model sees is what it sampled, even where its tokens are not the ones that its text would become.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np

from actors.episodes import Int32
from sim.contract import ChatMessage, TextObservation

_OPENING = ChatMessage(role="user", content="-")
_PLACEHOLDER = "ASSISTANT-TURN"
OPENINGS_KEPT = 256


class TextPolicy:
    """`actors.backends.contract.Policy` on a Hugging Face tokenizer with a chat template.

    A later turn is encoded by rendering a short conversation (a user's message, an assistant's
    message whose content is a placeholder, the new messages, the generation prompt) and tokenizing
    what follows the placeholder. That is what the template puts after any assistant message: the
    end of its turn, then the new messages. What a template puts at the start of a conversation,
    such as a default system prompt, is before the placeholder and is not repeated. The sampled turn
    may or may not end in the template's end-of-turn token already; then it is not added again. This
    holds for templates in which what follows an assistant message does not depend on what was
    before it.

    generation_config: transformers' GenerationConfig of the model, for its end-of-sequence tokens
    """

    def __init__(self, tokenizer: Any, *, generation_config: Any = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat "
                "template: use the instruct model's tokenizer, or put a chat_template.jinja into "
                "the model folder"
            )
        self._tokenizer = tokenizer
        # The samples of a group open with the same messages.
        self._opening = lru_cache(OPENINGS_KEPT)(self._encode_opening)
        closing = self._after_assistant((), generation_prompt=False)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        self._end_of_turn = next((token for token in closing.tolist() if token in special), None)
        ends = [
            *_token_ids(tokenizer.eos_token_id),
            *_token_ids(getattr(generation_config, "eos_token_id", None)),
            *_token_ids(self._end_of_turn),
        ]
        self._stop_tokens = tuple(sorted(set(ends)))
        if not self._stop_tokens:
            raise ValueError(
                "neither tokenizer, generation config nor chat template names a token that ends a "
                "turn: set the tokenizer's eos_token"
            )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a turn: end of sequence, and the template's end of turn. Ascending."""
        return self._stop_tokens

    def encode(self, history: Int32, observation: Any) -> Int32:
        """Tokens that the new messages become after `history`, with the generation prompt. int32
        [tokens].

        history: int32 [tokens], every token so far, the last sampled one included; empty at the
        first turn. Raises ValueError where the template refuses the messages, or the first turn has
        none.
        """
        if not isinstance(observation, TextObservation):
            raise TypeError(
                f"a text policy was shown a {type(observation).__name__}: its task must give "
                "TextObservation"
            )
        if len(history) == 0:
            if not observation.messages:
                raise ValueError(
                    "the first observation has no messages: a task's reset must give at least one"
                )
            return self._opening(tuple(observation.messages))
        tokens = self._after_assistant(observation.messages, generation_prompt=True)
        if self._end_of_turn is not None and history[-1] == self._end_of_turn:
            ends = np.flatnonzero(tokens == self._end_of_turn)
            tokens = tokens[ends[0] + 1 :]
        return tokens

    def decode(self, tokens: Int32) -> str:
        """The text of sampled tokens, special tokens left out."""
        text: str = self._tokenizer.decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _encode_opening(self, messages: tuple[ChatMessage, ...]) -> Int32:
        tokens = self._tokenize(self._render(messages, generation_prompt=True))
        tokens.flags.writeable = False  # it is handed out again
        return tokens

    def _after_assistant(
        self, messages: Sequence[ChatMessage], *, generation_prompt: bool
    ) -> Int32:
        """Tokens of what the template puts after an assistant's content: the turn's end, then
        `messages`.
        """
        placeholder = _PLACEHOLDER
        while any(placeholder in message.content for message in messages):
            placeholder += "-X"
        turn = ChatMessage(role="assistant", content=placeholder)
        text = self._render((_OPENING, turn, *messages), generation_prompt=generation_prompt)
        _, found, rest = text.rpartition(placeholder)
        if not found:
            raise ValueError(
                "the chat template leaves out an assistant message's content, so later turns "
                "cannot be encoded: use a template that renders every message"
            )
        return self._tokenize(rest)

    def _render(self, messages: Sequence[ChatMessage], *, generation_prompt: bool) -> str:
        conversation = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=generation_prompt
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise ValueError(
                f"the chat template refuses a conversation of roles {roles}: {error}. "
                "Let the task give messages that the template knows, or change the template"
            ) from error
        return text

    def _tokenize(self, text: str) -> Int32:
        # The template has written the special tokens that belong there, the first one included.
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array(ids, dtype=np.int32)


def _token_ids(ids: int | Iterable[int] | None) -> list[int]:
    """One id, several or none, as a list."""
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
