"""A byte-level BPE tokenizer trained on the conversations, and the chat template that goes with it.

    <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n

The end of a turn is the end-of-sequence token, so every engine stops there. No text gets a
beginning-of-sequence token, neither from the template nor from the tokenizer: there is nothing to
double. A turn is rendered from itself alone, so a shorter conversation is a prefix of a longer one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from MaxDraft.tiny_target.corpus import Message
from MaxDraft.tiny_target.recipe import SPECIAL_TOKENS, TEXT_END, TURN_END, TURN_START

# No token crosses a word's end. An identifier is one word, underscores and all, so that a name
# becomes one or two tokens: a small model can look it up, and repeat it.
WORDS = r" ?[A-Za-z_][A-Za-z0-9_]*| ?[0-9]+| ?[^\sA-Za-z0-9_]+|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation in tokens; `answered` is true where the assistant wrote the token."""

    tokens: list[int]
    answered: list[bool]


def train(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """BPE over bytes: any text round-trips. The same texts give the same tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, messages: Sequence[Message]) -> Encoded:
    """What CHAT_TEMPLATE renders, in tokens, with the assistant's words and ends of turn marked."""
    tokens, answered = [], []
    for message in messages:
        opening, turn = f"{TURN_START}{message['role']}\n", f"{message['content']}{TURN_END}"
        for text, written in (
            (opening, False),
            (turn, message["role"] == "assistant"),
            ("\n", False),
        ):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokens += ids
            answered += [written] * len(ids)
    return Encoded(tokens, answered)


def save(tokenizer: tokenizers.Tokenizer, folder: Path, max_length: int) -> None:
    """The files that transformers and the engines look for."""
    special = {"bos_token": TEXT_END, "eos_token": TURN_END, "pad_token": TEXT_END}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "additional_special_tokens": [TURN_START],
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
