"""YAML as text, and text as the type a key has.

YAML guesses types from spelling: `3e-4` becomes a string, `on` True, `1:30` 90, `0o17` 15. Here a
file is only parsed, so each scalar keeps the text that was typed and the line it stands on, and
the type of its key (config_keys.py) says what the text means.

A configuration is plain data. Anchors, aliases and tags are refused, and so are nesting and sizes
beyond anything a configuration needs, so that no file takes more than a moment to read.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from MaxDraft.config_keys import KEYS
from MaxDraft.errors import UserError

MAX_BYTES = 65_536
MAX_DEPTH = 16
MAX_PROBLEMS = 20  # of one place: a file of another kind has no key that is known

# No leading zeros: 017 is 15 to YAML and 17 to people. Nineteen digits may not fit in 64 bits.
_INT = re.compile(r"[+-]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_EXPECTED = {
    bool: "true or false",
    int: "an integer such as 8",
    float: "a finite number such as 0.5 or 3e-4",
    str: "text",
    list: "a list such as [a, b]",
    dict: "a mapping such as {hidden_size: 4096}",
}

_TRUE_ELSEWHERE = ("yes", "on", "1")
_FALSE_ELSEWHERE = ("no", "off", "0")


class ConfigError(UserError):
    """A mistake in the configuration; the message says what is wrong, where, and what to type."""


def stop_on(problems: Iterable[str]) -> None:
    """Raises one ConfigError that lists all `problems`; returns where there is none."""
    problems = list(problems)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join(["the configuration has problems:", *problems]))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean ...?` where a known name is close to `name`, else nothing.

    cutoff: the least similarity, from 0 to 1, as difflib.SequenceMatcher.ratio measures it.
    """
    near = difflib.get_close_matches(name[:80].lower(), list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """`value` for a message: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


# ----------------------------------------------------------------------------------- text -> nodes
class _NotPlainError(yaml.MarkedYAMLError):
    """YAML that no configuration needs."""


class _PlainLoader(yaml.SafeLoader):
    """Composes scalars, lists and mappings, and nothing else that YAML has."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse("anchors (&) and aliases (*) are not read; write the value out", event)
        if event.tag is not None:
            self._refuse(f"the tag {event.tag} is not read; write the plain value", event)
        if isinstance(event, yaml.ScalarEvent) and not is_unicode(event.value):
            self._refuse("an escape stands for no character", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, reason: str, event: yaml.Event) -> None:
        raise _NotPlainError(problem=reason, problem_mark=event.start_mark)


def read_keys(path: Path) -> list[tuple[str, int, yaml.Node]]:
    """(key, line, node) for each top-level key of a YAML file."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # no more than this, also of a device or a pipe
        root = _compose(data.decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: expected lines of `key: value`")
    return list(_pairs(root, lambda line: f"{path}:{line}"))


def _compose(text: str, where: str) -> yaml.Node | None:
    if len(text.encode("utf-8", "surrogateescape")) > MAX_BYTES:
        raise ConfigError(f"{where}: longer than {MAX_BYTES} bytes, so this is no configuration")
    try:
        return yaml.compose(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: of its numbers
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        kind = "" if isinstance(error, _NotPlainError) else "not YAML: "
        raise ConfigError(f"{where}{line}: {kind}{reason}") from error


def _pairs(
    node: yaml.MappingNode, place: Callable[[int], str]
) -> Iterator[tuple[str, int, yaml.Node]]:
    seen = set()
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{place(line)}: a key must be plain text")
        if key in seen:
            raise ConfigError(f"{place(line)}: {key} is given twice; keep one")
        seen.add(key)
        yield key, line, value_node


# --------------------------------------------------------------------------------- nodes -> values
def construct(node: yaml.Node, where: str) -> Any:
    """The value of a node that no key's type decides: an element of a list or of a mapping."""
    if isinstance(node, yaml.SequenceNode):
        return [construct(child, where) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: construct(child, where) for key, _, child in _pairs(node, lambda _: where)}
    return node.value if node.style else plain(node.value)


def plain(text: str) -> Any:
    """An unquoted scalar: null, true, false, a decimal number, or else the text itself."""
    if text.lower() in ("", "null", "~"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    if any(mark in text for mark in ".eE") and _is_float(text):
        return float(text)
    return text


def _is_float(text: str) -> bool:
    return bool(_FLOAT.fullmatch(text)) and math.isfinite(float(text))


def coerce_text(key: str, text: str, where: str) -> Any:
    """`text`, as it was typed, as the type of `key`; lists and mappings are YAML flow text."""
    node = None
    if KEYS[key].type in (list, dict):
        node = _compose(text, f"{where}: {key}")
    return coerce(key, node or yaml.ScalarNode("", text), where)


def coerce(key: str, node: yaml.Node, where: str) -> Any:
    """`node` as the type of `key`; ConfigError names place, key, expected type and value."""
    kind = KEYS[key].type
    if kind in (list, dict):
        return _collection(key, construct(node, where), where)
    expected = _EXPECTED[kind]
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: {key} must be {expected}, not {shown(construct(node, where))}")
    text = node.value
    if kind is str and is_unicode(text):
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and _INT.fullmatch(text):
        return int(text)
    if kind is float and _is_float(text):
        return float(text)
    hint = ""
    if kind is bool and text.lower() in _TRUE_ELSEWHERE + _FALSE_ELSEWHERE:
        hint = f"; write {'true' if text.lower() in _TRUE_ELSEWHERE else 'false'}"
    raise ConfigError(f"{where}: {key} must be {expected}, not {shown(text)}{hint}")


def _collection(key: str, value: Any, where: str) -> Any:
    kind = KEYS[key].type
    expected, holds = _ELEMENTS.get(KEYS[key].elements, (_EXPECTED[kind], lambda _: True))
    if type(value) is kind and holds(value):
        return value
    raise ConfigError(f"{where}: {key} must be {expected}, not {shown(value)}")


def is_unicode(text: str) -> bool:
    """False for the lone surrogates by which Python stands for bytes that are no UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _all(kind: type) -> Callable[[list], bool]:
    return lambda items: all(type(item) is kind for item in items)


def _are_axis_rules(items: list) -> bool:
    return all(
        type(rule) is list
        and len(rule) == 2
        and type(rule[0]) is str
        and type(rule[1]) is list
        and _all(str)(rule[1])
        for rule in items
    )


# What a list's elements must be, by the name that the table of keys has for them.
_ELEMENTS = {
    "integers": ("a list of integers such as [1, 13, 24]", _all(int)),
    "names": ("a list of names such as [data, fsdp, tensor]", _all(str)),
    "axis rules": (
        "a list of [logical axis, [mesh axes]] such as [[target_mlp, [tensor]]]",
        _are_axis_rules,
    ),
}
