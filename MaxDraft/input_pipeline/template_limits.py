"""Bounds on what a chat template may do, so that any template ends, soon and in little memory.

Loop iterations and calls are counted against a budget, and an operation whose result would be
enormous is refused. Counting, unlike a time limit, gives the same result on a slow machine as on a
fast one. It guards against mistakes and damage; a template made to exhaust a machine should not be
used at all.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
from jinja2 import nodes

MAX_STEPS = 5_000_000  # loop iterations and calls for one conversation: some seconds
MAX_TEXT = 1 << 26  # characters written for one conversation
CALL_STEPS = 10  # a call takes about as long as ten empty iterations
MAX_SIZE = 1 << 24  # characters or items of a value, a width, a count
MAX_BITS = 1 << 16  # of a number
WIDTH = re.compile(r"%[^%a-zA-Z]*\d{7}|\{[^{}]*\d{7}")  # in a format string


class LimitError(jinja2.TemplateError):
    """The template does more than any chat template has reason to."""


class Budget:
    """What the renderings of one conversation may use together."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Another conversation begins."""
        self.steps = self.characters = 0

    def count_steps(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise LimitError(f"it takes more than {MAX_STEPS} steps")

    def count_call(self) -> None:
        self.count_steps(CALL_STEPS)

    def count_text(self, length: int) -> None:
        self.characters += length
        if self.characters > MAX_TEXT:
            raise LimitError(f"it writes more than {MAX_TEXT} characters")

    def count_loop(self, items: Any) -> list[Any]:
        """The items of a loop, which are paid for before the first of them."""
        items = list(items)
        self.count_steps(len(items) + 1)
        return items


def check_operator(operator: str, left: Any, right: Any) -> None:
    """LimitError where `left operator right` would be enormous."""
    if operator == "%" and isinstance(left, str):
        check_widths(left)
        check_numbers(right if isinstance(right, tuple) else (right,))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length()
        if bits > MAX_BITS:
            raise LimitError("it computes an enormous number")
    elif operator == "*" and _size(left) * _size(right) > MAX_SIZE:
        raise LimitError("it repeats a text too often")


def count_everything(tree: nodes.Template) -> nodes.Template:
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


def concatenate(*values: Any) -> str:
    return checked("".join(map(str, values)))


def bounded_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja's that takes no enormous width and no format with one."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        check_numbers((*args, *kwargs.values()))
        if function is jinja2.filters.FILTERS["format"]:
            check_widths(str(args[0]))
        return checked(function(*args, **kwargs))

    return bounded


def check_numbers(values: Sequence[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_SIZE for value in values):
        raise LimitError("it asks for an enormous width or count")


def check_widths(text: str) -> None:
    if WIDTH.search(text):
        raise LimitError("it formats with an enormous width")


def checked(value: Any) -> Any:
    """The result of an operation, where a few more of its kind cannot fill the memory."""
    if isinstance(value, str | list | tuple) and len(value) > MAX_SIZE:
        raise LimitError("it makes a text that is too long")
    return value


def _size(value: Any) -> int:
    if isinstance(value, str | list | tuple):
        return len(value)
    return abs(value) if isinstance(value, int) else 0
