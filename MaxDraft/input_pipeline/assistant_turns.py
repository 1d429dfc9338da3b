"""Which characters of a rendered conversation the assistant wrote.

A turn begins where the template's generation prompt ends, which is where serving begins to write.
Where it stands in the text is measured, never searched for, so that a user who types the
assistant's markup marks nothing:

    `{% generation %}`   where the template has these blocks, they are the turns
    otherwise            the conversation is rendered again with a placeholder for every reply;
                         what stands around the placeholders must be found around the replies, to
                         the last character. What the template puts between the generation prompt
                         and a reply (an empty <think> block) belongs to the turn: the start is
                         the length of the shorter conversation, rendered with a generation prompt.

Templates of reasoning models delete the thoughts of earlier replies. The rest of such a reply is
something that serving never writes behind that prompt, so it is context and no turn; it is counted.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import DataError, TemplateError
from MaxDraft.input_pipeline.template_renderer import TemplateRenderer
from MaxDraft.input_pipeline.template_sandbox import Span

THINK_START, THINK_END = "<think>", "</think>"  # templates of reasoning models split a reply here
QUESTION, ANSWER = Message("user", "Why?"), Message("assistant", "Because.")
PROBE = (QUESTION, ANSWER, QUESTION, ANSWER)


@dataclasses.dataclass(frozen=True)
class LocatedTurns:
    """A rendered conversation and the turns in it, mostly without their end tokens."""

    text: str
    spans: tuple[Span, ...]
    replies: int  # that were looked for
    shortened_replies: int  # of them without a span: the template deletes a part of each


@dataclasses.dataclass(frozen=True)
class Probe:
    """A small rendered conversation, of which nothing but the messages' contents is known."""

    text: str
    contents: tuple[Span, ...]  # where the messages stand; all else is the template's markup
    reply_end: int  # where the last reply ends


class TurnLocator:
    """Finds the turns of conversations that one template renders.

    DataError where the template cannot render even a question and an answer.
    """

    def __init__(self, renderer: TemplateRenderer) -> None:
        self._renderer = renderer
        self._generation_prompt = ""
        self.probe = self._probe()

    def locate(self, messages: Sequence[Message], last_only: bool = False) -> LocatedTurns:
        """The turns of a conversation that ends with a reply; last_only: only of that reply.

        TemplateError where it cannot be rendered, or no turn is found in it.
        """
        self._renderer.begin_conversation()
        text, blocks = self._renderer.render(messages)
        replies = [message for message in messages if message.role == "assistant"]
        if self._renderer.has_generation_blocks:
            spans = _whole_blocks(text, blocks, replies)[-1 if last_only else 0 :]
        else:
            spans = self._measure(messages, text, last_only)
        whole = tuple(span for span in spans if span is not None)
        if not whole:
            raise TemplateError("the chat template deletes a part of every reply")
        return LocatedTurns(text, whole, len(spans), len(spans) - len(whole))

    def _measure(
        self, messages: Sequence[Message], text: str, last_only: bool = False
    ) -> list[Span | None]:
        """The turns of a template without generation blocks; None: a part of it is deleted."""
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        pieces = self._surroundings(messages)
        spans, at = [], 0
        for index, before, after in zip(replies, pieces[:-1], pieces[1:], strict=True):
            if not text.startswith(before, at):
                raise TemplateError("the chat template writes differently around other replies")
            at += len(before)
            # A template may strip a reply; what follows it decides which form it has here.
            for form in _stripped_forms(messages[index].content):
                if text.startswith(form + after, at):
                    break
            else:
                raise TemplateError("the chat template changes the words of a reply")
            if not last_only or index == replies[-1]:
                start = self._turn_start(messages[:index], text, before, at)
                shown = text[start:at]
                whole = all(thoughts in shown for thoughts in _thoughts(messages[index]))
                spans.append((start, at + len(form)) if whole else None)
            at += len(form)
        if text[at:] != pieces[-1]:
            raise TemplateError("the chat template writes differently around other replies")
        return spans

    def _surroundings(self, messages: Sequence[Message]) -> list[str]:
        """What the template writes before, between and after the n replies: n + 1 pieces."""
        used = set().union(*(message.content for message in messages))
        used.update(*(message.reasoning for message in messages))
        mark = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in used), None)
        if mark is None:
            raise TemplateError("the text uses every private-use character")
        count, replaced = 0, []
        for message in messages:
            content = message.content
            if message.role == "assistant":
                # Templates look for the end of the thoughts, so it must stay where it is.
                thoughts, think_end, _ = content.rpartition(THINK_END)
                content = f"{thoughts}{think_end}{mark}{count}{mark}"
                count += 1
            replaced.append(dataclasses.replace(message, content=content))
        text, _ = self._renderer.render(replaced)
        placeholders = list(re.finditer(f"{mark}(\\d+){mark}", text))
        if [int(match[1]) for match in placeholders] != list(range(count)):
            raise TemplateError("the chat template does not write every reply exactly once")
        starts = [0, *(match.end() for match in placeholders)]
        ends = [*(match.start() for match in placeholders), len(text)]
        return [text[start:end] for start, end in zip(starts, ends, strict=True)]

    def _turn_start(self, earlier: Sequence[Message], text: str, before: str, reply: int) -> int:
        """Where serving would begin to write the reply whose words stand at text[reply:]."""
        if self._generation_prompt and before.endswith(self._generation_prompt):
            return reply
        if not earlier:
            return reply  # nothing to render a generation prompt after
        prompt, _ = self._renderer.render(earlier, add_generation_prompt=True)
        # Where serving's prompt reads on differently (it opens a <think> block that the history
        # does not show), the words themselves are what is certainly the assistant's.
        is_prefix = reply - len(before) <= len(prompt) <= reply and text.startswith(prompt)
        return len(prompt) if is_prefix else reply

    def _probe(self) -> Probe:
        """Learns the generation prompt from a small conversation, and whether turns are found."""
        try:
            text, blocks = self._renderer.render(PROBE)
            opened, _ = self._renderer.render(PROBE[:1], add_generation_prompt=True)
            plain, _ = self._renderer.render(PROBE[:1])
            pieces = self._surroundings(PROBE)
            if not self._renderer.has_generation_blocks:
                self._measure(PROBE, text)
        except TemplateError as error:
            raise DataError(
                f"the chat template cannot render a question and an answer: {error}; give the "
                f"template that the target is served with: chat_template=FILE"
            ) from error
        if opened.startswith(plain):
            self._generation_prompt = opened[len(plain) :]
        if self._renderer.has_generation_blocks:
            answers = [len(pieces[0]), len(pieces[0]) + len(ANSWER.content) + len(pieces[1])]
            if not blocks or not all(any(s <= at < e for at in answers) for s, e in blocks):
                raise DataError(
                    "the {% generation %} blocks of the chat template do not enclose the "
                    "assistant's words (blocks inside a macro or a set block are misplaced); put "
                    "them around message.content and its end-of-turn token, or remove them: the "
                    "turns are then measured"
                )
        contents, at = [], 0
        for message in PROBE:
            start = text.find(message.content, at)
            if start >= 0:
                at = start + len(message.content)
                contents.append((start, at))
        return Probe(text, tuple(contents), len(text) - len(pieces[-1]))


def _whole_blocks(
    text: str, blocks: Sequence[Span], replies: Sequence[Message]
) -> list[Span | None]:
    """The blocks of a template that marks turns itself; None: a part of the reply is deleted."""
    expected = [[*_thoughts(reply), _words(reply.content).strip()] for reply in replies]
    if len(blocks) == len(replies):
        return [
            (start, end) if all(part in text[start:end] for part in parts) else None
            for (start, end), parts in zip(blocks, expected, strict=True)
        ]
    # Several blocks make a reply, so that a reply that lacks something cannot be told from others.
    written, at = "".join(text[start:end] for start, end in blocks), 0
    for part in (part for parts in expected for part in parts):
        at = written.find(part, at)
        if at < 0:
            raise TemplateError("the chat template deletes a part of a reply")
        at += len(part)
    return list(blocks)


def _thoughts(reply: Message) -> list[str]:
    """What the assistant thought, without white space around it; nothing where it did not."""
    inside = reply.content.rpartition(THINK_END)[0].strip().removeprefix(THINK_START)
    return [text for text in (reply.reasoning.strip(), inside.strip()) if text]


def _words(content: str) -> str:
    """A reply's words behind its thoughts."""
    return content.rpartition(THINK_END)[2]


def _stripped_forms(content: str) -> list[str]:
    """A reply's words (behind its thoughts) as templates write them, the least stripped first."""
    words = _words(content)
    heads: list[str] = [words, words.lstrip("\n"), words.lstrip()]
    forms = [form for head in heads for form in (head, head.rstrip("\n"), head.rstrip())]
    return list(dict.fromkeys(forms))
