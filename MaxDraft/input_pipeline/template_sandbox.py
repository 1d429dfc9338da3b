"""The Jinja sandbox in which chat templates run: transformers' own, without clocks and chance.

Templates are programs from elsewhere. They see plain values, change nothing, and read no attribute
that Python uses for itself. The functions beside Jinja's are those that transformers gives them,
and do the same, but for the clock, which stands at PINNED_TIME.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from MaxDraft.input_pipeline.template_limits import (
    Budget,
    bounded_filter,
    check_numbers,
    check_operator,
    check_widths,
    checked,
    concatenate,
)

# Llama 3.1's template names this day where it is given none.
PINNED_TIME = datetime.datetime(2024, 7, 26)
Span = tuple[int, int]  # characters [start, end) of a text


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


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of one template, and what it has used up."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
        )
        self.budget = Budget()
        self.position = 0  # in the text that is being rendered
        self.blocks: list[Span] = []
        self.filters.pop("random")
        self.filters = {name: bounded_filter(f) for name, f in self.filters.items()}
        self.filters |= {
            "tojson": _to_json,
            "_count_loop": self.budget.count_loop,
            "_concatenate": concatenate,
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

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        __self.budget.count_call()
        check_numbers((*args, *kwargs.values()))
        return checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        if getattr(value, "__name__", "") in ("format", "format_map"):
            check_widths(value.__self__)
        return super().wrap_str_format(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return checked(super().call_binop(context, operator, left, right))


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
    check_widths("%" + str(text))
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
