"""YAML as text, and text as the type a key has.

YAML guesses types from spelling: `3e-4` becomes a string, `on` True, `1:30` 90, `0o17` 15. Here a
file is only parsed, so each scalar keeps the text that was typed and the line it stands on, and
the type of its key says what the text means.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from MaxDraft.errors import UserError

# No leading zeros: 017 is 15 to YAML and 17 to people.
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


def _all(kind: type) -> Callable[[list], bool]:
    return lambda items: all(type(item) is kind for item in items)


def _is_rules(items: list) -> bool:
    return all(
        type(rule) is list
        and len(rule) == 2
        and type(rule[0]) is str
        and type(rule[1]) is list
        and _all(str)(rule[1])
        for rule in items
    )


# What the elements of a list are: an empty default cannot say.
_ELEMENTS = {
    "target_layer_ids": ("a list of integers such as [1, 13, 24]", _all(int)),
    "mesh_axes": ("a list of names such as [data, fsdp, tensor]", _all(str)),
    "logical_axis_rules": (
        "a list of [logical axis, [mesh axes]] such as [[target_mlp, [tensor]]]",
        _is_rules,
    ),
}


class ConfigError(UserError):
    """A mistake in the configuration; the message says what is wrong, where, and what to type."""


def stop_on(problems: Iterable[str]) -> None:
    """Raises one ConfigError that lists all `problems`; returns where there is none."""
    problems = list(problems)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  ".join(["the configuration has problems:", *problems]))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` where a known name is close to `name`, else nothing."""
    near = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def read_keys(path: Path) -> list[tuple[str, int, yaml.Node]]:
    """(key, line, node) for each top-level key of a YAML file."""
    try:
        root = _compose(path.read_text(encoding="utf-8"), str(path))
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
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}{line}: not YAML: {reason}") from error


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


def construct(node: yaml.Node, where: str) -> Any:
    """The value of a node that no key's type decides: a default, or a list's or dict's element."""
    if isinstance(node, yaml.SequenceNode):
        return [construct(child, where) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: construct(child, where) for key, _, child in _pairs(node, lambda _: where)}
    return node.value if node.style else _plain(node.value)


def _plain(text: str) -> Any:
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


def coerce_text(key: str, default: Any, text: str, where: str) -> Any:
    """`text`, as it was typed, as the type of `default`; lists and dicts are YAML flow text."""
    node = None
    if isinstance(default, list | dict):
        node = _compose(text, f"{where}: {key}")
    return coerce(key, default, node or yaml.ScalarNode("", text), where)


def coerce(key: str, default: Any, node: yaml.Node, where: str) -> Any:
    """`node` as the type of `default`; ConfigError names place, key, expected type and value."""
    kind = type(default)
    expected = _EXPECTED[kind]
    if kind in (list, dict):
        value = construct(node, where)
        expected, holds = _ELEMENTS.get(key, (expected, lambda _: True))
        if type(value) is kind and holds(value):
            return value
        raise ConfigError(f"{where}: {key} must be {expected}, not {value!r}")
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: {key} must be {expected}, not {construct(node, where)!r}")
    text = node.value
    if kind is str:
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
    raise ConfigError(f"{where}: {key} must be {expected}, not {text!r}{hint}")


class Dumper(yaml.SafeDumper):
    """Quotes what `_plain` would not read back as the same text."""


def _represent_str(dumper: Dumper, text: str) -> yaml.Node:
    style = None if _plain(text) == text else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_str)
