"""A chat template as a function from messages to text: the same on every day, and bounded.

A template is a program that comes with a tokenizer. It is rendered as transformers renders it (the
same Jinja sandbox, options and extra functions), with three differences:

    clocks    every clock that a template can read stands at PINNED_TIME: texts that carry the day
              on which they were encoded could not be made again when a run is resumed
    chance    `lipsum` and the filter `random` are refused, for the same reason
    bounds    loop iterations and calls are counted against a budget, and an operation whose result
              would be enormous is refused. Counting, unlike a time limit, gives the same result on
              a slow machine as on a fast one. It guards against mistakes and damage; a template
              made to exhaust a machine should not be used at all.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import TemplateError

# Llama 3.1's template names this day where it is given none.
PINNED_TIME = datetime.datetime(2024, 7, 26)
DATE_FORMAT = "%d %b %Y"
GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MAX_STEPS = 5_000_000  # loop iterations and calls for one conversation: some seconds
MAX_TEXT = 1 << 26  # characters written for one conversation
CALL_STEPS = 10  # a call takes about as long as ten empty iterations
MAX_SIZE = 1 << 24  # characters or items of a value, a width, a count
MAX_BITS = 1 << 16  # of a number
WIDTH = re.compile(r"%[^%a-zA-Z]*\d{7}|\{[^{}]*\d{7}")  # in a format string
Span = tuple[int, int]  # characters [start, end) of a text


class _LimitError(jinja2.TemplateError):
    """The template does more than any chat template has reason to."""


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_write"), [], [], body).set_lineno(line)

    def _write(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.environment.add_block(len(text))
        return text


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of one template, and what it has used up."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
        )
        self.steps = self.written = self.position = 0
        self.blocks: list[Span] = []
        self.filters.pop("random")
        self.filters = {name: _bounded_filter(f) for name, f in self.filters.items()}
        self.filters |= {
            "tojson": _to_json,
            "_count_loop": self._count_loop,
            "_concatenate": _concatenate,
        }
        self.globals.pop("lipsum")
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_pinned,
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def add_block(self, length: int) -> None:
        """A generation block of `length` characters begins at the present position."""
        self.blocks.append((self.position, self.position + length))

    def count_steps(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _LimitError(f"it takes more than {MAX_STEPS} steps")

    def count_text(self, length: int) -> None:
        self.written += length
        if self.written > MAX_TEXT:
            raise _LimitError(f"it writes more than {MAX_TEXT} characters")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.count_steps(CALL_STEPS)
        _check_numbers((*args, *kwargs.values()))
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            _check_widths(value.__self__)
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
            _check_numbers(right if isinstance(right, tuple) else (right,))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length()
            if bits > MAX_BITS:
                raise _LimitError("it computes an enormous number")
        elif operator == "*" and _size(left) * _size(right) > MAX_SIZE:
            raise _LimitError("it repeats a text too often")
        return _checked(super().call_binop(context, operator, left, right))

    def _count_loop(self, items: Any) -> list[Any]:
        """The items of a loop, which are paid for before the first of them."""
        items = list(items)
        self.count_steps(len(items) + 1)
        return items


class TemplateRenderer:
    """A compiled chat template; TemplateError where it is none.

    variables: what every rendering is given beside the messages, such as bos_token.
    """

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        self.has_generation_blocks = bool(GENERATION_BLOCK.search(template))
        self._variables = {"date_string": PINNED_TIME.strftime(DATE_FORMAT), **variables}
        self._environment = _Environment()
        with _template_errors():
            tree = self._environment.parse(template)
            self._template = self._environment.from_string(_count_everything(tree))

    def begin_conversation(self) -> None:
        """The renderings that follow share one budget."""
        self._environment.steps = self._environment.written = 0

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
                environment.count_text(len(piece))
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


def _count_everything(tree: nodes.Template) -> nodes.Template:
    """Sends the items of every loop and the operands of every ~ through a filter that counts."""
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_count_loop", [], [], None, None, lineno=loop.lineno)
    for node in reversed(list(tree.find_all(nodes.Node))):  # inner operands first
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, field, _as_filter(value))
            elif isinstance(value, list):
                value[:] = [_as_filter(v) if isinstance(v, nodes.Concat) else v for v in value]
    tree.set_environment(tree.environment)
    return tree


def _as_filter(node: nodes.Concat) -> nodes.Filter:
    return nodes.Filter(
        node.nodes[0], "_concatenate", node.nodes[1:], [], None, None, lineno=node.lineno
    )


def _concatenate(*values: Any) -> str:
    return _checked("".join(map(str, values)))


def _bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that takes no enormous width and no format with one."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers((*args, *kwargs.values()))
        if function is jinja2.filters.FILTERS["format"]:
            _check_widths(str(args[0]))
        return _checked(function(*args, **kwargs))

    return bounded


def _check_numbers(values: Sequence[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_SIZE for value in values):
        raise _LimitError("it asks for an enormous width or count")


def _check_widths(text: str) -> None:
    if WIDTH.search(text):
        raise _LimitError("it formats with an enormous width")


def _checked(value: Any) -> Any:
    """The result of an operation, where a few more of its kind cannot fill the memory."""
    if isinstance(value, str | list | tuple) and len(value) > MAX_SIZE:
        raise _LimitError("it makes a text that is too long")
    return value


def _size(value: Any) -> int:
    if isinstance(value, str | list | tuple):
        return len(value)
    return abs(value) if isinstance(value, int) else 0


class _Dict:
    """`dict` of a template, without the attributes of Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` of a template, without names that Python uses for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *positional = args
        names = dict(*positional, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace takes no name like {name!r}")


def _strftime_pinned(text: str) -> str:
    _check_widths("%" + str(text))
    return PINNED_TIME.strftime(text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' own: Jinja's filter would escape HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
