"""A conversation in the target's own tokens, with every token the assistant wrote marked.

    text     = the tokenizer's chat template, rendered once for the whole conversation
    tokens   = text, tokenized once, without adding special tokens: the template wrote them
    turn_ids = j where the j-th assistant turn wrote the token, else 0

A turn (see assistant_turns.py) ends with the end-of-turn token, where serving stops.

Serving tokenizes the rendered text, so that a user who types `<|im_end|>` sends that token: the
same happens here, and prompts are those of serving. A reply that holds such markup is different:
serving would have stopped at it, and what follows would be trained behind the reply's own end. Such
a conversation is not encoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection, Sequence

import jinja2
import numpy as np
import tokenizers
import transformers

from MaxDraft.input_pipeline.assistant_turns import (
    THINK_END,
    THINK_START,
    LocatedTurns,
    TurnLocator,
)
from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import DataError, TemplateError
from MaxDraft.input_pipeline.template_renderer import TemplateRenderer
from MaxDraft.input_pipeline.template_sandbox import PINNED_TIME

LOSS_TURNS = ("all", "last")


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """tokens int32 [n]; turn_ids int32 [n]: 0, or the number (1, 2, ...) of the assistant turn."""

    tokens: np.ndarray
    turn_ids: np.ndarray
    replies: int = 0  # that could be turns
    shortened_replies: int = 0  # that are none, since the template deletes a part of them


class ChatEncoder:
    """Conversations -> tokens and turn ids, with one tokenizer and its template.

    loss_turns: "all" assistant turns are marked, or the "last" of each conversation only.
    stop_token_ids: the tokens at which serving stops, beside those that tokenizer and template
    show. DataError where the template cannot render even a question and an answer.
    """

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerFast,
        loss_turns: str = "all",
        stop_token_ids: Collection[int] = (),
    ) -> None:
        if loss_turns not in LOSS_TURNS:
            raise DataError(f"loss_turns is {loss_turns!r}; choose one of {', '.join(LOSS_TURNS)}")
        self.tokenizer = tokenizer
        self.loss_turns = loss_turns
        # The tokenizer may hold several templates by name; this is the one used without tools.
        try:
            self._template = tokenizer.get_chat_template()
            self._renderer = TemplateRenderer(self._template, tokenizer.special_tokens_map)
        except (ValueError, TemplateError) as error:
            raise DataError(
                f"no chat template can be used: {error}; give one with chat_template=FILE"
            ) from error
        self._locator = TurnLocator(self._renderer)
        # A copy, because of two changes: nothing is padded or cut, and there is no post-processor,
        # which could only add special tokens and take leading spaces out of the offsets.
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.post_processor = None
        self._added_tokens = tokenizer.added_tokens_decoder  # id -> AddedToken
        self.end_ids: frozenset[int] = frozenset()
        self.template_ids: frozenset[int] = frozenset()
        self._markup = re.compile("(?!)")
        self._learn_markup(stop_token_ids)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which tokens and turn ids come out."""
        parts = (
            self._backend.to_str(),
            self._template,
            repr(sorted(self.tokenizer.special_tokens_map.items())),
            PINNED_TIME.isoformat(),
            repr(sorted(self.end_ids)),
            self._markup.pattern,
            self.loss_turns,
            transformers.__version__,
            tokenizers.__version__,
            jinja2.__version__,
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def special_ids(self, counts: np.ndarray) -> tuple[int, ...]:
        """Ids every draft vocabulary needs: ends of turn, and special tokens inside of replies.

        counts: int64 [V], how often the assistant wrote each token.
        """
        written = {i for i in self._added_tokens if i < len(counts) and counts[i] > 0}
        return tuple(sorted(written | {i for i in self.end_ids if 0 <= i < len(counts)}))

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
        located: list[LocatedTurns | TemplateError] = []
        for messages in conversations:
            try:
                messages = _until_last_reply(messages)
                self._check_replies(messages)
                located.append(self._locator.locate(messages, self.loss_turns == "last"))
            except TemplateError as error:
                located.append(error)
        texts = [turns.text for turns in located if isinstance(turns, LocatedTurns)]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            self._mark(next(encodings), turns) if isinstance(turns, LocatedTurns) else turns
            for turns in located
        ]

    def _check_replies(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if message.role != "assistant":
                continue
            for text in (message.content, message.reasoning):
                if match := self._markup.search(text):
                    raise TemplateError(
                        f"a reply that contains the chat template's own markup {match[0]!r}"
                    )

    def _mark(self, encoding: tokenizers.Encoding, turns: LocatedTurns) -> EncodedConversation:
        """A token belongs to the turn in which its first character stands."""
        tokens = np.array(encoding.ids, np.int32)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        turn_ids = np.zeros(len(tokens), np.int32)
        for turn, (start, end) in enumerate(turns.spans, start=1):
            first, last = np.searchsorted(starts, [start, end])
            turn_ids[first : self._turn_end(tokens, starts, turns.text, first, last)] = turn
        return EncodedConversation(tokens, turn_ids, turns.replies, turns.shortened_replies)

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

    def _learn_markup(self, stop_token_ids: Collection[int]) -> None:
        """Which tokens the template writes, which of them end a turn, and how they are spelled."""
        probe = self._locator.probe
        encoding = self._backend.encode(probe.text, add_special_tokens=False)
        tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
        self.template_ids = frozenset(
            token
            for token, (start, end) in tokens
            if not any(start < e and s < end for s, e in probe.contents)
        )
        behind = (
            token
            for token, (start, end) in tokens
            if start >= probe.reply_end and probe.text[start:end].strip()
        )
        end_of_turn = {next(behind, None)} & set(self._added_tokens)
        stops = {self.tokenizer.eos_token_id, *stop_token_ids} - {None}
        self.end_ids = frozenset(end_of_turn | stops)
        spellings = {
            token.content
            for i, token in self._added_tokens.items()
            if i in self.end_ids or (i in self.template_ids and token.special)
        }
        # A reply may hold its thoughts, whatever kind of token marks them.
        spellings -= {THINK_START, THINK_END}
        longest_first = sorted(spellings, key=lambda spelling: (-len(spelling), spelling))
        self._markup = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def check_vocabulary(encoder: ChatEncoder, target_vocab_size: int) -> None:
    """DataError where the chat template writes a token that the target has no embedding for.

    The other tokens of a tokenizer do not matter until data holds them: some tokenizers know an
    image's token beyond the embedding of the text model, and targets are padded to round sizes.
    """
    largest = max(encoder.template_ids, default=0)
    if largest >= target_vocab_size:
        raise DataError(
            f"the chat template writes token {largest}, the target only knows ids below its "
            f"vocab_size {target_vocab_size}: they do not belong together; check "
            f"tokenizer_path and target_path"
        )


def _until_last_reply(messages: Sequence[Message]) -> Sequence[Message]:
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    if last < 0:
        raise TemplateError("no assistant message")
    return messages[: last + 1]
