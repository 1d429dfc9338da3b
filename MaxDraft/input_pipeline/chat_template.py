"""A conversation in the target's own tokens, with every token the assistant wrote marked.

    text     = the tokenizer's chat template, rendered once for the whole conversation
    tokens   = text, tokenized once, without adding special tokens: the template wrote them
    turn_ids = j where the j-th assistant turn wrote the token, else 0

A turn begins where the template's generation prompt ends, which is where serving begins to write,
and ends with the end-of-turn token, where serving stops. Where it stands in the text is measured,
never searched for, so that a user who types the assistant's markup marks nothing:

    `{% generation %}`   where the template has these blocks, they are the turns
    otherwise            the conversation is rendered again with a placeholder for every reply;
                         what stands around the placeholders must be found around the replies, to
                         the last character. What the template puts between the generation prompt
                         and a reply (an empty <think> block) belongs to the turn: the start is
                         the length of the shorter conversation, rendered with a generation prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import DataError, TemplateError

LOSS_TURNS = ("all", "last")
THINK_END = "</think>"  # templates of reasoning models split a reply here
# Some templates write today's date, and the data of a resumed run must not depend on the day it is
# made. This is the day that Llama 3.1's template names on its own.
DATE = "26 Jul 2024"
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Span = tuple[int, int]  # characters [start, end) of a text


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """tokens int32 [n]; turn_ids int32 [n]: 0, or the number (1, 2, ...) of the assistant turn."""

    tokens: np.ndarray
    turn_ids: np.ndarray


def load_tokenizer(
    path: Path, trust_remote_code: bool = False, chat_template_file: Path | None = None
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a folder; chat_template_file: a Jinja template that replaces its own.

    Nothing is downloaded. DataError: no such folder or file, a tokenizer that cannot be loaded or
    has no fast version (only those know character offsets), no chat template.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"tokenizer_path: {path} is not a folder with tokenizer files")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        # transformers also reads config.json there, and stumbles over families it does not know.
        hint = "; a folder of the tokenizer's files alone, without config.json, is enough"
        hint += "" if trust_remote_code else "; if it brings its own code, trust_remote_code=True"
        raise DataError(f"the tokenizer in {path} cannot be loaded: {error}{hint}") from error
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {path} has no fast version, and only fast ones know which "
            f"characters a token covers; convert it to a tokenizer.json"
        )
    if chat_template_file:
        try:
            tokenizer.chat_template = Path(chat_template_file).expanduser().read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"chat_template: {chat_template_file} cannot be read: {error}"
            ) from error
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {path} has no chat template: the prompts the target is served with "
            f"cannot be known. Take the tokenizer of the instruction-tuned model, or give the "
            f"Jinja file it is served with: chat_template=FILE"
        )
    return tokenizer


def check_vocabulary(
    tokenizer: transformers.PreTrainedTokenizerBase, target_vocab_size: int
) -> None:
    """DataError where the tokenizer has ids that the target has no embedding for.

    Fewer ids than the target are fine: targets are padded to round sizes.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    if size > target_vocab_size:
        raise DataError(
            f"the tokenizer knows token ids up to {size - 1}, the target only ids below its "
            f"vocab_size {target_vocab_size}: they do not belong together; check "
            f"tokenizer_path and target_path"
        )


class ChatEncoder:
    """Conversations -> tokens and turn ids, with one tokenizer and its template.

    loss_turns: "all" assistant turns are marked, or the "last" of each conversation only.
    DataError where the template cannot render even a question and an answer.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerFast, loss_turns: str = "all"
    ) -> None:
        if loss_turns not in LOSS_TURNS:
            raise DataError(f"loss_turns is {loss_turns!r}; choose one of {', '.join(LOSS_TURNS)}")
        self.tokenizer = tokenizer
        self.loss_turns = loss_turns
        # The tokenizer may hold several templates by name; this is the one used without tools.
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"no chat template to use: {error}; give one with chat_template=FILE"
            ) from error
        self._variables = {"date_string": DATE, **tokenizer.special_tokens_map}
        self._marks_generation = bool(GENERATION_BLOCK.search(self._template))
        # A copy, because of two changes: nothing is padded or cut, and there is no post-processor,
        # which could only add special tokens and take leading spaces out of the offsets.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.post_processor = None
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self.end_ids: frozenset[int] = frozenset()
        self._generation_prompt = ""
        self._probe()

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens and turn ids come out."""
        parts = (
            self._backend.to_str(),
            self._template,
            repr(sorted(self._variables.items())),
            repr(sorted(self.end_ids)),
            self.loss_turns,
            transformers.__version__,
            tokenizers.__version__,
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def special_ids(self, counts: np.ndarray) -> tuple[int, ...]:
        """Ids every draft vocabulary needs: ends of turn, and special tokens found in replies.

        counts: int64 [V], how often the assistant wrote each token.
        """
        written = {i for i in self._added_ids if i < len(counts) and counts[i] > 0}
        return tuple(sorted(written | self.end_ids))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, special tokens shown."""
        return self._backend.decode([int(t) for t in tokens], skip_special_tokens=False)

    def encode(self, messages: Sequence[Message]) -> EncodedConversation:
        """One conversation; TemplateError where it cannot be rendered or a reply not located."""
        (encoded,) = self.encode_batch([messages])
        if isinstance(encoded, TemplateError):
            raise encoded
        return encoded

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]]
    ) -> list[EncodedConversation | TemplateError]:
        """One result for each conversation, in order; tokenized by several threads.

        Messages after the last reply are left out: nothing is learnt from them.
        """
        located: list[tuple[str, list[Span]] | TemplateError] = []
        for messages in conversations:
            try:
                located.append(self._locate(_until_last_reply(messages)))
            except TemplateError as error:
                located.append(error)
        texts = [one[0] for one in located if not isinstance(one, TemplateError)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            one if isinstance(one, TemplateError) else self._mark(next(encodings), *one)
            for one in located
        ]

    # ------------------------------------------------------------------ where the turns stand
    def _locate(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The rendered text, and the characters of each turn, mostly without its end token."""
        text, blocks = self._render(messages)
        spans = blocks if self._marks_generation else self._measure(messages, text)
        if not spans:
            raise TemplateError("the chat template leaves the assistant's words out")
        return text, spans[-1:] if self.loss_turns == "last" else spans

    def _measure(self, messages: Sequence[Message], text: str) -> list[Span]:
        """The turns in `text` of a template without generation blocks."""
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        pieces = self._around(messages)
        spans, at = [], 0
        for index, before, after in zip(replies, pieces[:-1], pieces[1:], strict=True):
            if not text.startswith(before, at):
                raise TemplateError("the chat template writes differently around other replies")
            at += len(before)
            # A template may strip a reply; what follows it decides which form it has here.
            for form in _forms(messages[index].content):
                if text.startswith(form + after, at):
                    break
            else:
                raise TemplateError("the chat template changes the words of a reply")
            spans.append((self._start(messages[:index], text, before, at), at + len(form)))
            at += len(form)
        if text[at:] != pieces[-1]:
            raise TemplateError("the chat template writes differently around other replies")
        return spans

    def _around(self, messages: Sequence[Message]) -> list[str]:
        """What the template writes before, between and after the n replies: n + 1 pieces."""
        everything = "".join(message.content for message in messages)
        mark = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in everything), None)
        if mark is None:
            raise TemplateError("the text uses every private-use character")
        count = itertools.count()
        placeholders, replaced = [], []
        for message in messages:
            content = message.content
            if message.role == "assistant":
                placeholders.append(f"{mark}{next(count)}{mark}")
                # Templates look for the end of the thoughts, so it must stay where it is.
                thoughts, think_end, _ = content.rpartition(THINK_END)
                content = thoughts + think_end + placeholders[-1]
            replaced.append(Message(message.role, content))
        rest, _ = self._render(replaced)
        pieces = []
        for placeholder in placeholders:
            piece, found, rest = rest.partition(placeholder)
            if not found or placeholder in rest:
                raise TemplateError("the chat template does not write every reply exactly once")
            pieces.append(piece)
        return [*pieces, rest]

    def _start(self, earlier: Sequence[Message], text: str, before: str, reply: int) -> int:
        """Where serving would begin to write the reply whose words stand at text[reply:]."""
        if self._generation_prompt and before.endswith(self._generation_prompt):
            return reply
        if not earlier:
            return reply  # nothing to render a generation prompt after
        prompt, _ = self._render(earlier, add_generation_prompt=True)
        # Where serving's prompt reads on differently (it opens a <think> block that the history
        # does not show), the words themselves are what is certainly the assistant's.
        is_prefix = reply - len(before) <= len(prompt) <= reply and text.startswith(prompt)
        return len(prompt) if is_prefix else reply

    # ------------------------------------------------------------------ from characters to tokens
    def _mark(
        self, encoding: tokenizers.Encoding, text: str, spans: Sequence[Span]
    ) -> EncodedConversation:
        """A token belongs to the turn in which its first character stands."""
        tokens = np.array(encoding.ids, np.int32)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        turn_ids = np.zeros(len(tokens), np.int32)
        for turn, (start, end) in enumerate(spans, start=1):
            first, last = np.searchsorted(starts, [start, end])
            turn_ids[first : self._turn_end(tokens, starts, text, first, last)] = turn
        return EncodedConversation(tokens, turn_ids)

    def _turn_end(
        self, tokens: np.ndarray, starts: np.ndarray, text: str, first: int, last: int
    ) -> int:
        """Behind the end-of-turn token, which stands at the end of tokens[first:last] or follows.

        White space that the template puts before it is the turn's, behind it is not.
        """

        def blank(i: int) -> bool:
            end = starts[i + 1] if i + 1 < len(starts) else len(text)
            return not text[starts[i] : end].strip()

        i = last
        while i > first and tokens[i - 1] not in self.end_ids and blank(i - 1):
            i -= 1
        if i > first and tokens[i - 1] in self.end_ids:
            return i
        i = last
        while i < len(tokens) and tokens[i] not in self.end_ids and blank(i):
            i += 1
        return i + 1 if i < len(tokens) and tokens[i] in self.end_ids else last

    # ------------------------------------------------------------------ the template
    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, blocks = render_jinja_template(
                [[{"role": m.role, "content": m.content} for m in messages]],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=self._marks_generation,
                **self._variables,
            )
        # A template is a program: adding a number to a string is a TypeError of Python's.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateError(f"the chat template refuses it: {error}") from error
        return texts[0], [(start, end) for start, end in blocks[0]] if blocks else []

    def _probe(self) -> None:
        """Learns the generation prompt and the end-of-turn token from two small conversations."""
        question, answer = Message("user", "Why?"), Message("assistant", "Because.")
        try:
            dialogue = [question, answer, question, answer]
            text, blocks = self._render(dialogue)
            opened, _ = self._render([question], add_generation_prompt=True)
            plain, _ = self._render([question])
            pieces = self._around(dialogue)
            if not self._marks_generation:
                self._measure(dialogue, text)
        except TemplateError as error:
            raise DataError(
                f"the chat template cannot render a question and an answer: {error}; give the "
                f"template that the target is served with: chat_template=FILE"
            ) from error
        if opened.startswith(plain):
            self._generation_prompt = opened[len(plain) :]
        if self._marks_generation:
            answers = [len(pieces[0]), len(pieces[0]) + len(answer.content) + len(pieces[1])]
            if not blocks or not all(any(s <= at < e for at in answers) for s, e in blocks):
                raise DataError(
                    "the {% generation %} blocks of the chat template do not enclose the "
                    "assistant's words (blocks inside a macro or a set block are misplaced); put "
                    "them around message.content and its end-of-turn token, or remove them: the "
                    "turns are then measured"
                )
        self.end_ids = frozenset(self._ends(text, len(text) - len(pieces[-1])))

    def _ends(self, text: str, reply_end: int) -> set[int]:
        """The special token that follows the last reply, and the tokenizer's end of sequence."""
        ends = {self.tokenizer.eos_token_id} - {None}
        encoding = self._backend.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if start >= reply_end and text[start:end].strip():
                return ends | ({token} & self._added_ids)
        return ends


def _until_last_reply(messages: Sequence[Message]) -> Sequence[Message]:
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if last < 0:
        raise TemplateError("no assistant message")
    return messages[: last + 1]


def _forms(content: str) -> list[str]:
    """A reply's words (behind its thoughts) as templates write them, the least stripped first."""
    words = content.rpartition(THINK_END)[2]
    heads: list[str] = [words, words.lstrip("\n"), words.lstrip()]
    forms = [form for head in heads for form in (head, head.rstrip("\n"), head.rstrip())]
    return list(dict.fromkeys(forms))
