"""Conversations about the standard library, out of its own docstrings and signatures.

The library's source files are read and parsed, never imported: importing runs code. Out of every
documented function, class and method come an `Entry`, and out of an entry questions and answers:

    what does it do?             the first sentence of its documentation, and its parameters
    show the signature           a code block, then which parameters are required
    which are optional?          a list, from the signature in the question
    where does it come from?     the import and a call
    which methods has a class?   a list with one line for each
    what is in a module?         its documentation and its functions

Some conversations go on over several turns, some begin with a system message. Everything is sorted
and drawn by a checksum of the entry's name, so that one Python installation always gives one text.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

Message = dict[str, str]  # role, content
Record = dict[str, list[Message]]  # messages

# Modules that people know and that every supported Python has. The target sees each of their entries
# a dozen times, so it learns what they are instead of learning to spell.
MODULES = """
    argparse ast asyncio.tasks asyncio.queues asyncio.locks base64 bisect calendar cmd code
    codecs collections colorsys configparser contextlib copy csv difflib dis fileinput filecmp
    fnmatch fractions ftplib functools getpass gettext glob graphlib gzip heapq hmac html
    inspect io ipaddress json keyword linecache locale logging mimetypes operator os pickle
    pkgutil platform posixpath pprint queue random sched secrets selectors shelve shlex shutil
    socket statistics string subprocess tempfile textwrap threading timeit tokenize traceback
    types typing urllib.parse uuid warnings weakref zipfile zipapp
""".split()
FEWEST_ENTRIES = 150  # a whole standard library has about three times as many
SYSTEM_MESSAGES = (
    "You answer questions about the Python standard library.",
    "You are a short and exact guide to Python.",
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


class CorpusError(RuntimeError):
    """The standard library's documented source cannot be read here."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter as it is written: `name` carries its stars, `default` is source text."""

    name: str
    default: str | None = None
    keyword_only: bool = False

    @property
    def required(self) -> bool:
        return self.default is None and not self.name.startswith("*")

    def __str__(self) -> str:
        return self.name if self.default is None else f"{self.name}={self.default}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A documented function, class, method or module."""

    kind: str
    module: str
    owner: str  # the class of a method
    name: str
    summary: str
    parameters: tuple[Parameter, ...] = ()
    members: tuple[tuple[str, str], ...] = ()  # name and summary of what a class or module holds

    @property
    def path(self) -> str:
        return ".".join(part for part in (self.module, self.owner, self.name) if part)

    @property
    def signature(self) -> str:
        parts, stars = [], False
        for parameter in self.parameters:
            stars |= parameter.name.startswith("*")
            if parameter.keyword_only and not stars:
                parts, stars = [*parts, "*"], True
            parts.append(str(parameter))
        return f"{self.name}({', '.join(parts)})"


def standard_library() -> Path:
    """The folder of this Python's standard library; CorpusError where it holds no source."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "textwrap.py").is_file():
        raise CorpusError(
            f"the tiny target learns from the source of Python's standard library, and {folder} "
            "holds none (a zip file, or compiled files only); run a Python that was installed "
            "with its .py files, or give a real target with target_path and grain_train_files"
        )
    return folder


def read_entries(library: Path) -> list[Entry]:
    """Every documented public entry, in the order of its path; CorpusError where too few are."""
    entries = [entry for source in _sources(library) for entry in _entries(*source)]
    if len(entries) < FEWEST_ENTRIES:
        raise CorpusError(
            f"{library} has only {len(entries)} documented functions and classes, and the tiny "
            f"target needs {FEWEST_ENTRIES}: the documentation was stripped from this Python; "
            "use another one, or give a real target with target_path and grain_train_files"
        )
    return sorted(entries, key=lambda entry: (entry.path, entry.kind))


def conversations(entries: Sequence[Entry]) -> list[Record]:
    """Records in OpenAI's form; no two begin with the same question."""
    records, asked = [], set()
    for entry in entries:
        for record in _about(entry):
            question = next(m["content"] for m in record["messages"] if m["role"] == "user")
            if question not in asked:
                asked.add(question)
                records.append(record)
    return sorted(records, key=lambda record: _draw(record["messages"][-1]["content"]))


# --------------------------------------------------------------------------- reading the library
def _sources(library: Path) -> Iterator[tuple[str, Path]]:
    for module in MODULES:
        plain = library.joinpath(*module.split("."))
        for path in (plain.with_suffix(".py"), plain / "__init__.py"):
            if path.is_file():
                yield module, path


def _entries(module: str, path: Path) -> Iterator[Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in the library's own strings
        tree = ast.parse(path.read_bytes(), filename=str(path))
    found = list(_definitions(tree, module))
    yield from found
    members = tuple((e.name, e.summary) for e in found if e.kind == "function")
    summary = _summary(tree)
    if summary and members:
        yield Entry("module", module, "", "", summary, members=members)


def _definitions(tree: ast.Module, module: str) -> Iterator[Entry]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(node, module, "")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [
                entry
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
                for entry in _function(inner, module, node.name)
            ]
            yield from methods
            summary = _summary(node)
            if summary:
                members = tuple((method.name, method.summary) for method in methods)
                yield Entry("class", module, "", node.name, summary, members=members)


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, owner: str
) -> Iterator[Entry]:
    summary = _summary(node)
    parameters = _parameters(node.args, drop_first=bool(owner) and not _static(node))
    short = len(parameters) <= 5 and sum(len(str(p)) for p in parameters) <= 60
    if summary and short and not node.name.startswith("_"):
        kind = "method" if owner else "function"
        yield Entry(kind, module, owner, node.name, summary, parameters)


def _static(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)


def _parameters(args: ast.arguments, drop_first: bool) -> tuple[Parameter, ...]:
    def source(default: ast.expr | None) -> str | None:
        return None if default is None else ast.unparse(default)

    plain = [arg.arg for arg in args.posonlyargs + args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + [source(d) for d in args.defaults]
    found = [Parameter(*pair) for pair in zip(plain, defaults, strict=True)][drop_first:]
    if args.vararg:
        found.append(Parameter(f"*{args.vararg.arg}"))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(Parameter(arg.arg, source(default), keyword_only=True))
    if args.kwarg:
        found.append(Parameter(f"**{args.kwarg.arg}"))
    return tuple(found)


def _summary(node: ast.AST) -> str:
    """First sentence of the docstring on one line; empty where it is no plain short sentence."""
    text = ast.get_docstring(node) or ""
    text = " ".join(text.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z\)'\"`])\.(?:\s|$)", text)[0].rstrip(".:;,") + "."
    plain = sentence.isascii() and re.match(r"[A-Z][a-z]+ ", sentence) and "`" not in sentence
    return sentence if plain and 20 <= len(sentence) <= 110 else ""


# ------------------------------------------------------------------------- questions and answers
def _about(entry: Entry) -> Iterator[Record]:
    if entry.kind == "module":
        yield _record(entry, "module", _module(entry))
        return
    if entry.kind == "class":
        yield _record(entry, "what", _what_class(entry))
        if entry.members:
            yield _record(entry, "methods", _methods(entry))
        return
    draw = _draw(entry.path + " turns")
    if draw % 3 == 0:  # one conversation of several turns
        yield _record(entry, "turns", _what(entry), _signature(entry, follows=True))
    else:
        yield _record(entry, "what", _what(entry))
        yield _record(entry, "signature", _signature(entry, follows=False))
    if entry.parameters:
        yield _record(entry, "optional", _optional(entry))
    if entry.kind == "function":
        yield _record(entry, "import", _import(entry))


def _what(entry: Entry) -> tuple[str, str]:
    question = _pick(
        entry,
        "what",
        f"What does `{entry.path}` do?",
        f"Explain `{entry.path}` to me.",
        f"What is `{entry.path}` good for?",
    )
    return question, f"{_place(entry)} {entry.summary} {_takes(entry)}"


def _what_class(entry: Entry) -> tuple[str, str]:
    question = _pick(
        entry, "class", f"What is `{entry.path}`?", f"What is the class `{entry.path}` for?"
    )
    return question, f"{_place(entry)} {entry.summary}"


def _methods(entry: Entry) -> tuple[str, str]:
    lines = [f"- `{name}`: {summary}" for name, summary in entry.members[:3]]
    more = len(entry.members) - len(lines)
    end = f"\n\nThere are {more} more." if more else ""
    return (
        f"Which methods has the class `{entry.path}`?",
        f"The class `{entry.path}` has these methods:\n\n" + "\n".join(lines) + end,
    )


def _module(entry: Entry) -> tuple[str, str]:
    names = [f"`{name}`" for name, _ in entry.members[:4]]
    return (
        f"What is in the module `{entry.module}`?",
        f"The module `{entry.module}` is described like this: {entry.summary} "
        f"Among its functions: {_listed(names)}.",
    )


def _signature(entry: Entry, follows: bool) -> tuple[str, str]:
    subject = "it" if follows else f"`{entry.path}`"
    question = f"How is {subject} called?" if follows else f"Show the signature of {subject}."
    return (
        question,
        f"The signature of `{entry.path}` is:\n\n"
        f"```python\ndef {entry.signature}\n```\n\n{_takes(entry)}",
    )


def _optional(entry: Entry) -> tuple[str, str]:
    lines = []
    for parameter in entry.parameters:
        if parameter.required:
            lines.append(f"- `{parameter.name}` is required.")
        elif parameter.default is None:
            lines.append(f"- `{parameter.name}` takes all that remain.")
        else:
            lines.append(f"- `{parameter.name}` is optional, the default is `{parameter.default}`.")
    question = f"Which parameters of `{entry.signature}` are optional?"
    return question, f"The parameters of `{entry.signature}`:\n\n" + "\n".join(lines)


def _import(entry: Entry) -> tuple[str, str]:
    names = ", ".join(p.name for p in entry.parameters if p.required)
    return (
        f"How do I use `{entry.name}` from `{entry.module}`?",
        f"Import `{entry.name}` from `{entry.module}` and call it:\n\n"
        f"```python\nfrom {entry.module} import {entry.name}\n\n"
        f"result = {entry.name}({names})\n```",
    )


def _place(entry: Entry) -> str:
    if entry.kind == "method":
        return f"`{entry.path}` is a method of the class `{entry.owner}`."
    return f"`{entry.path}` is a {entry.kind} of the module `{entry.module}`."


def _takes(entry: Entry) -> str:
    count = len(entry.parameters)
    if count == 0:
        return "It takes no parameters."
    names = [f"`{parameter.name}`" for parameter in entry.parameters]
    return f"It takes {NUMBERS[count]} parameter{'s' if count > 1 else ''}: {_listed(names)}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _record(entry: Entry, kind: str, *turns: tuple[str, str]) -> Record:
    messages = []
    draw = _draw(f"{entry.path} {kind} system")
    if draw % 5 == 0:
        messages.append({"role": "system", "content": SYSTEM_MESSAGES[draw // 5 % 2]})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def _pick(entry: Entry, kind: str, *texts: str) -> str:
    return texts[_draw(f"{entry.path} {kind}") % len(texts)]


def _draw(text: str) -> int:
    """A number that depends on the text alone (hash() differs between processes)."""
    return zlib.crc32(text.encode())
