"""`--help` and `--help KEY`: how to call an entry script, and what one key means.

What a key means stands in the comment above it in base.yml, what it may hold in config_keys.py.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from MaxDraft.config_keys import KEYS, Key
from MaxDraft.config_layers import ENVIRONMENT_PREFIX, SCHEMA_PATH
from MaxDraft.config_renames import explain_key
from MaxDraft.config_yaml import ConfigError, shown

HELP = ("--help", "-h", "help")
WIDTH = 100  # columns

USAGE = """\
usage: python3 {program} {base} key=value ...
       python3 {program} --help KEY      what one key means, and what it may hold

{purpose}The keys, with defaults and comments, are in {base}. A value comes from the strongest of
  {base}  <  configs/models/<model_name>.yml  <  environment {prefix}<KEY>  <  key=value
where evaluate.py and export.py read the run's own config.yml after the model file.
"""


def answer_and_exit(argv: Sequence[str]) -> None:
    """Prints the help that argv asks for and ends with status 0; returns where it asks for none."""
    text = answer(argv)
    if text is None:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader of `--help | head` is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def answer(argv: Sequence[str]) -> str | None:
    """The text that argv = [program, ...] asks for; None where it asks for no help.

    ConfigError where it asks about a key that there is not.
    """
    words = [word for argument in argv[1:] for word in _words(argument)]
    asked = next((index for index, word in enumerate(words) if word in HELP), None)
    if asked is None:
        return None
    topics = [word for word in words[asked + 1 :] if "=" not in word]
    if not topics:
        return usage(argv[0])
    key = topics[0].lstrip("-")
    if key not in KEYS:
        raise ConfigError(f"there is no key {shown(key)}{explain_key(key, KEYS)}")
    return describe(key)


def _words(argument: str) -> list[str]:
    """--help=KEY is --help KEY."""
    flag, equals, key = argument.partition("=")
    return [flag, key] if equals and flag in HELP else [argument]


def usage(program: str) -> str:
    """How a script is called, what it is for, and the names of all keys."""
    text = USAGE.format(
        program=program,
        base="configs/base.yml",
        prefix=ENVIRONMENT_PREFIX,
        purpose=_purpose(program),
    )
    sections: dict[str, list[str]] = {}
    for key, (_, section, _) in documentation().items():
        sections.setdefault(section, []).append(key)
    for section, keys in sections.items():
        text += f"\n{section}\n" + _wrapped(" ".join(keys))
    return text.rstrip()


def _purpose(program: str) -> str:
    """The docstring at the head of the script; nothing where the program is none."""
    path = Path(program)
    if path.suffix != ".py" or not path.is_file():
        return ""
    source = path.read_text(encoding="utf-8")
    first = next(iter(ast.parse(source).body), None)
    if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
        return ""
    # As it is written: a backslash at the end of a line joins lines of a command for the shell too.
    docstring = ast.get_source_segment(source, first) or ""
    return docstring.strip('r"\n') + "\n\n"


def describe(key: str) -> str:
    """What one key means, its default, and what it may hold."""
    variable = ENVIRONMENT_PREFIX + key.upper()
    comment, _, default = documentation()[key]
    row = KEYS[key]
    lines = [f"{key}: {default}", _wrapped(comment), f"  type            {_type(row)}"]
    if row.needs:
        other, values = row.needs
        lines.append(f"  has an effect   with {' or '.join(_pair(other, v) for v in values)} only")
    may = {True: "yes", False: "no"}
    lines += [
        f"  may change when a run is resumed    {may[row.resume]}",
        f"  may stand in a model file           {may[row.model_file]}",
        f"\n{key}=VALUE on the command line sets it, or {variable}=VALUE in the environment",
    ]
    return "\n".join(lines)


def _pair(key: str, value: object) -> str:
    return f"{key}={value}" if value != "" else f"an empty {key}"


def _type(row: Key) -> str:
    if row.choices:
        return f"one of {', '.join(choice or 'empty' for choice in row.choices)}"
    names = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping"}
    if row.type is list:
        return f"list of {row.elements}"
    name = "path, in which ~ is the home folder" if row.path else names[row.type]
    return f"{name}, {row.range}" if row.range else name


def documentation() -> dict[str, tuple[str, str, str]]:
    """Key -> (the comment above it in base.yml, its section, its default as it stands there)."""
    documented: dict[str, tuple[str, str, str]] = {}
    section, comment, key = "", [], ""
    for line in SCHEMA_PATH.read_text(encoding="utf-8").splitlines():
        pair = re.match(r"(\w+):(.*)", line)
        if line.startswith("# ---"):
            section, comment = line.strip("# -"), []
        elif line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif pair:
            key = pair[1]
            documented[key] = (" ".join(comment), section, pair[2].strip())
            comment = []
        elif line.strip() and key:  # the lines of a list
            text, place, default = documented[key]
            documented[key] = (text, place, f"{default}\n{line}")
        else:
            comment = []
    return documented


def _wrapped(text: str) -> str:
    indent = "  "
    lines = textwrap.wrap(text, WIDTH - len(indent), break_long_words=False)
    return "".join(f"{indent}{line}\n" for line in lines)
