"""The built-in tokenizer "characters": printable ASCII, one token a character, with a chat template.

It lets a whole job run with no file downloaded. A conversation renders as, for every message, one special token that
opens its role, the characters of its content, and the end-of-sequence token, which ends the turn. Messages render
independently of each other, so the messages that are new in a turn can be rendered alone and appended to the history.
"""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant", "tool")
CHARACTERS = (
    "\n" + " " + string.digits + string.ascii_uppercase + string.ascii_lowercase
) + string.punctuation

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"

# The end-of-turn token of an assistant message is the one that generation stops at.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ('system', 'user', 'assistant', 'tool') -%}"
    "{{ raise_exception('unknown role ' + message.role + ': use system, user, assistant or tool') }}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' + message.content + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_characters_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer. Its vocabulary is fixed: special tokens first, then `CHARACTERS`; others become <unk>."""
    special = [PAD, BOS, EOS, UNKNOWN, *(f"<|{role}|>" for role in ROLES)]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # "." would not match a newline.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
