"""A chat template as a function from messages to text: the same on every day, and bounded.

A template is a program that comes with a tokenizer. It is rendered as transformers renders it (the
same Jinja sandbox, options and extra functions), with three differences:

    clocks    every clock that a template can read stands at PINNED_TIME: texts that carry the day
              on which they were encoded could not be made again when a run is resumed
    chance    `lipsum` and the filter `random` are refused, for the same reason
    bounds    what it may do for one conversation is limited (template_limits.py)
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import TemplateError
from MaxDraft.input_pipeline.template_limits import count_everything
from MaxDraft.input_pipeline.template_sandbox import PINNED_TIME, Span, TemplateEnvironment

DATE_FORMAT = "%d %b %Y"
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class TemplateRenderer:
    """A compiled chat template; TemplateError where it is none.

    variables: what every rendering is given beside the messages, such as bos_token.
    """

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        self.has_generation_blocks = bool(GENERATION_BLOCK.search(template))
        self._variables = {"date_string": PINNED_TIME.strftime(DATE_FORMAT), **variables}
        self._environment = TemplateEnvironment()
        with _template_errors():
            tree = self._environment.parse(template)
            self._template = self._environment.from_string(count_everything(tree))

    def begin_conversation(self) -> None:
        """The renderings that follow share one budget."""
        self._environment.budget.restart()

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and where its generation blocks stand. TemplateError: it cannot be rendered."""
        environment, pieces = self._environment, []
        environment.position, environment.blocks = 0, []
        with _template_errors():
            for piece in self._template.generate(
                messages=[_as_dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                environment.budget.count_text(len(piece))
                pieces.append(piece)
                environment.position += len(piece)
        return "".join(pieces), environment.blocks


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    """A template is a program: adding a number to a string is a TypeError of Python's."""
    try:
        yield
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise TemplateError(f"the chat template refuses it: {reason}") from error


def _as_dict(message: Message) -> dict[str, str]:
    entry = {"role": message.role, "content": message.content}
    if message.reasoning:
        # Most templates read the first name, gpt-oss the second.
        entry |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    return entry
