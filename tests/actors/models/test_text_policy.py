"""Messages to tokens and back, under the templates of the common model families."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.models.text_policy import TextPolicy
from actors.models.tokenizer import build_characters_tokenizer
from sim.contract import ChatMessage, TextObservation

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen2.5's: a conversation without a system message gets one.
CHATML_WITH_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
    "{% endif %}"
) + CHATML
# Like Llama 3's: a beginning-of-text token, trimmed content, blank lines after headers.
LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
# Like Llama 2's and Mistral's: strict alternation, a space before the end-of-sequence token, no generation prompt.
INSTRUCT = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}"
    "{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
# name: template, its end-of-turn token, and what the model puts between its text and that token
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", ""),
    "default-system": (CHATML_WITH_DEFAULT_SYSTEM, "<|im_end|>", ""),
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "instruct": (INSTRUCT, "<eos>", " "),
}
SPECIAL = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
]


def build_tokenizer(template: str | None) -> Any:
    """One token a printable character, and the special tokens of all templates."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=SPECIAL[3:],
        chat_template=template,
    )


def shown(*messages: tuple[str, str]) -> TextObservation:
    return TextObservation(messages=tuple(ChatMessage(role=r, content=c) for r, c in messages))


def text_of(tokenizer: Any, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.fixture(params=list(TEMPLATES))
def family(request: pytest.FixtureRequest) -> SimpleNamespace:
    template, end, gap = TEMPLATES[request.param]
    tokenizer = build_tokenizer(template)
    return SimpleNamespace(
        name=request.param,
        tokenizer=tokenizer,
        policy=TextPolicy(tokenizer),
        end=tokenizer.convert_tokens_to_ids(end),
        gap=gap,
    )


@pytest.mark.parametrize("ended", [True, False])
def test_turns_build_the_conversation_that_the_template_renders(
    family: SimpleNamespace, ended: bool
):
    """Whether or not the model sampled the end of its turn, it is there once.

    History and new tokens, turn after turn, are the template's rendering of the whole conversation.
    """
    tokenizer, policy = family.tokenizer, family.policy
    conversation = [{"role": "user", "content": "Guess 1 to 9."}]
    history = policy.encode(np.zeros(0, np.int32), shown(("user", "Guess 1 to 9.")))
    for answer, reply in (("5", "higher"), ("I say 8", "lower\nand hurry"), ("6", "right!")):
        # "instruct" opens the turn in the model's output, for want of a generation prompt.
        said = (" " if family.name == "instruct" else "") + answer
        sampled = tokenizer(said + (family.gap if ended else ""), add_special_tokens=False)
        tail = [family.end] if ended else []
        history = np.array([*history, *sampled["input_ids"], *tail], dtype=np.int32)
        new = policy.encode(history, shown(("user", reply)))
        assert new.dtype == np.int32
        history = np.concatenate((history, new))
        conversation += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": reply},
        ]
        rendered = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        assert text_of(tokenizer, history) == rendered
        assert history.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_the_first_turn_is_the_template_with_a_generation_prompt():
    policy = TextPolicy(build_tokenizer(LLAMA3))
    tokens = policy.encode(np.zeros(0, np.int32), shown(("system", "Be brief."), ("user", "Hi")))
    assert text_of(build_tokenizer(LLAMA3), tokens) == (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_default_system_prompt_comes_once():
    """The template inserts it into a conversation without one: at the first turn only."""
    tokenizer = build_tokenizer(CHATML_WITH_DEFAULT_SYSTEM)
    policy = TextPolicy(tokenizer)
    first = policy.encode(np.zeros(0, np.int32), shown(("user", "a")))
    assert text_of(tokenizer, first).count("You are helpful.") == 1
    later = policy.encode(first, shown(("user", "b")))
    assert text_of(tokenizer, later) == (
        "<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_several_new_messages_come_in_their_order():
    """A tool's answer and the user's next words belong to one turn."""
    tokenizer = build_tokenizer(CHATML)
    policy = TextPolicy(tokenizer)
    history = np.array([tokenizer.convert_tokens_to_ids("<|im_end|>")], dtype=np.int32)
    new = policy.encode(history, shown(("tool", "42"), ("user", "So?")))
    assert text_of(tokenizer, new) == (
        "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("content", ["ASSISTANT-TURN", "ASSISTANT-TURN-X and ASSISTANT-TURN"])
def test_new_messages_may_hold_the_placeholder(content: str):
    tokenizer = build_tokenizer(CHATML)
    new = TextPolicy(tokenizer).encode(np.array([20], dtype=np.int32), shown(("user", content)))
    assert text_of(tokenizer, new) == (
        f"<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_history_is_not_tokenized_again():
    """Tokens that no text would become stay: only the new ones are returned, whatever came before."""
    tokenizer = build_tokenizer(CHATML)
    policy = TextPolicy(tokenizer)
    odd = np.array([3, 3, 0, 2, 1], dtype=np.int32)
    plain = np.array([30], dtype=np.int32)
    new = policy.encode(odd, shown(("user", "b")))
    assert new.tolist() == policy.encode(plain, shown(("user", "b"))).tolist()
    assert odd.tolist() == [3, 3, 0, 2, 1]


def test_stop_tokens_are_every_end_of_sequence_and_the_end_of_turn():
    """The generation config may name several; the template's own is found by itself."""
    tokenizer = build_tokenizer(LLAMA3)
    eos, eot, end = tokenizer.convert_tokens_to_ids(["<eos>", "<|eot_id|>", "<|im_end|>"])
    assert TextPolicy(tokenizer).stop_tokens == tuple(sorted((eos, eot)))
    several = SimpleNamespace(eos_token_id=[end, eot])
    policy = TextPolicy(tokenizer, generation_config=several)
    assert policy.stop_tokens == tuple(sorted((eos, eot, end)))
    one = SimpleNamespace(eos_token_id=end)
    assert end in TextPolicy(tokenizer, generation_config=one).stop_tokens


def test_decoded_text_has_no_special_tokens(family: SimpleNamespace):
    tokens = family.tokenizer("The answer: 12\n", add_special_tokens=False)["input_ids"]
    sampled = np.array([*tokens, family.end], dtype=np.int32)
    assert family.policy.decode(sampled) == "The answer: 12\n"
    assert family.policy.decode(np.zeros(0, np.int32)) == ""


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(ValueError, match=r"has no chat template: use the instruct model's token"):
        TextPolicy(build_tokenizer(None))


def test_a_template_that_drops_assistant_messages_is_refused():
    with pytest.raises(ValueError, match="leaves out an assistant message's content"):
        TextPolicy(
            build_tokenizer(
                "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
            )
        )


def test_messages_that_the_template_refuses_are_named():
    """The template's own words, and the roles it was given."""
    policy = TextPolicy(build_tokenizer(INSTRUCT))
    with pytest.raises(ValueError, match="roles user, user: roles must alternate user/assistant"):
        policy.encode(np.zeros(0, np.int32), shown(("user", "a"), ("user", "b")))


def test_observations_of_another_kind_are_refused():
    policy = TextPolicy(build_tokenizer(CHATML))
    with pytest.raises(TypeError, match="was shown a ndarray: its task must give TextObservation"):
        policy.encode(np.zeros(0, np.int32), np.zeros(3))
    with pytest.raises(ValueError, match="first observation has no messages"):
        policy.encode(np.zeros(0, np.int32), shown())


def test_the_built_in_tokenizer_builds_its_own_conversation():
    """Its template ends every message, the user's too, with the token that ends the model's."""
    tokenizer = build_characters_tokenizer()
    policy = TextPolicy(tokenizer)
    assert policy.stop_tokens == (tokenizer.eos_token_id,)
    first = policy.encode(np.zeros(0, np.int32), shown(("user", "12+3=")))
    said = tokenizer("15", add_special_tokens=False)["input_ids"]
    for tail in ([], [tokenizer.eos_token_id]):
        history = np.array([*first, *said, *tail], dtype=np.int32)
        whole = np.concatenate((history, policy.encode(history, shown(("user", "next: 4+4=")))))
        conversation = [
            {"role": "user", "content": "12+3="},
            {"role": "assistant", "content": "15"},
            {"role": "user", "content": "next: 4+4="},
        ]
        rendered = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        assert whole.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]


def test_without_new_messages_the_policy_is_asked_again():
    """A task that says nothing gives the model another turn."""
    tokenizer = build_tokenizer(CHATML)
    new = TextPolicy(tokenizer).encode(np.array([20], dtype=np.int32), shown())
    assert text_of(tokenizer, new) == "<|im_end|>\n<|im_start|>assistant\n"
