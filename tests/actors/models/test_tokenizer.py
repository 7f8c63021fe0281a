"""The built-in tokenizer: every character there and back, and what a conversation becomes."""

from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from actors.models.tokenizer import CHARACTERS, ROLES, build_characters_tokenizer

TOKENIZER = build_characters_tokenizer()
CONVERSATION = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " 1+1= "},
    {"role": "assistant", "content": "2"},
]


@given(st.text(alphabet=CHARACTERS))
def test_text_comes_back_as_it_was(text: str):
    """One token a character; no spaces are added, joined or cleaned up."""
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text)
    assert TOKENIZER.decode(tokens) == text


def test_all_printable_ascii_and_newline_are_known():
    """And nothing twice."""
    assert set(CHARACTERS) == {"\n", *map(chr, range(32, 127))}
    assert len(CHARACTERS) == len(set(CHARACTERS))


def test_other_characters_are_unknown():
    """One unknown token each."""
    unknown = TOKENIZER.unk_token_id
    assert TOKENIZER.encode("aé\t☃b", add_special_tokens=False)[1:4] == [unknown] * 3


def test_a_conversation_has_one_token_per_role_and_end():
    """Role, content, end of sequence, for each message; then the assistant's turn is opened."""
    tokens = TOKENIZER.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_dict=False
    )
    ids = {role: TOKENIZER.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}
    expected = []
    for message in CONVERSATION:
        expected += [
            ids[message["role"]],
            *TOKENIZER.encode(message["content"], add_special_tokens=False),
            TOKENIZER.eos_token_id,
        ]
    assert tokens == [*expected, ids["assistant"]]
    content = "".join(message["content"] for message in CONVERSATION)
    assert TOKENIZER.decode(tokens, skip_special_tokens=True) == content


def test_an_unknown_role_is_refused():
    """It names the role and the known ones."""
    with pytest.raises(jinja2.TemplateError, match="unknown role robot: use system, user"):
        TOKENIZER.apply_chat_template([{"role": "robot", "content": ""}])


def test_a_saved_folder_gives_the_same_tokenizer(tmp_path: Path):
    """Special tokens and chat template too."""
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    tokens = TOKENIZER.apply_chat_template(CONVERSATION, return_dict=False)
    assert loaded.apply_chat_template(CONVERSATION, return_dict=False) == tokens
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.special_tokens_map == TOKENIZER.special_tokens_map
