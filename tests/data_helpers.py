"""Small tokenizers, chat templates in the shapes of the known families, and files of records."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from MaxDraft.input_pipeline.chat_template import ChatEncoder
from MaxDraft.input_pipeline.conversations import Message

SPECIAL = (
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|head_end|>",
    "<|eot|>",
    "<|User|>",
    "<|Assistant|>",
)
THINK = ("<think>", "</think>")
SENTENCES = (
    "user assistant system What is the answer to this question? The answer is forty two.",
    "Tell me more, please. Here is more: the quick brown fox jumps over the lazy dog.",
    "Hello there. How are you today? I am well, thank you, and you are kind to ask.",
)

CHATML = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# The beginning of the text in the template, headers between two tokens, trimmed contents.
HEADERS = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|head|>' + m.role + '<|head_end|>\n\n' + m.content | trim + '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|head_end|>\n\n' }}{%- endif %}"
)
# Shows thoughts, or an empty block, in the last turn only.
LAST_TURN_THINKS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' -%}"
    "{%- set words = m.content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- set thoughts = '' -%}{%- if '</think>' in m.content -%}"
    "{%- set thoughts = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- endif -%}"
    "{%- if loop.last -%}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{%- endif -%}"
    "{{ words }}{%- else -%}{{ m.content }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
# Drops thoughts from the history, and opens them in the generation prompt.
OPENS_THOUGHTS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# No generation prompt: a space before the reply, which serving writes itself; strict about order.
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' -%}{% generation %}{{ m.content + '<|im_end|>\n' }}"
    "{% endgeneration %}{%- else -%}{{ m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@functools.cache
def backend(sentencepiece: bool = False, trim_offsets: bool = False) -> str:
    """JSON of a trained tokenizer; the ids of SPECIAL are 0, 1, ..."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if sentencepiece:  # spaces are ▁, and the text begins with one
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Metaspace()
        alphabet = sorted({c for s in SENTENCES for c in s} | set("▁\n[]/INST_<>|!"))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=False) for t in THINK])
    if not sentencepiece:
        # Writes <bos> before every text, as tokenizers do whose templates write it too.
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=trim_offsets),
                processors.TemplateProcessing("<bos> $A", None, [("<bos>", 0)]),
            ]
        )
    return tokenizer.to_str()


def make_tokenizer(template: str | None, **kinds: bool) -> transformers.PreTrainedTokenizerFast:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend(**kinds)),
        bos_token="<bos>",
        eos_token="<eos>",
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def make_encoder(template: str = CHATML, loss_turns: str = "all", **kinds: bool) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(template, **kinds), loss_turns)


def dialogue(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = [Message(roles[i % 2], content) for i, content in enumerate(contents)]
    return tuple([Message("system", system), *messages] if system else messages)


def record(*contents: str) -> dict:
    return {"messages": as_dicts(dialogue(*contents))}


def as_dicts(messages: Iterable[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def write_lines(path: Path, lines) -> Path:
    """Each line a string, bytes, or a record."""
    with path.open("wb") as file:
        for line in lines:
            text = line if isinstance(line, str | bytes) else json.dumps(line)
            file.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    return path


def many_records(count: int, seed: int = 0) -> list[dict]:
    """Different conversations of one to three exchanges, of different lengths."""
    rng = np.random.default_rng(seed)
    words = " ".join(SENTENCES).split()

    def say(number: int) -> str:
        return f"{number} " + " ".join(rng.choice(words, rng.integers(2, 14)))

    return [record(*[say(n) for _ in range(2 * int(rng.integers(1, 4)))]) for n in range(count)]
