"""Conversations about the standard library, out of its own docstrings and signatures.

The library's source files are read and parsed, never imported: importing runs code. Out of every
documented function and class of well-known modules come an `Entry`, and out of an entry questions,
each asked in several ways, and their answers:

    what does it do?             the first sentence of its documentation, and its parameters
    how is it called?            its signature in a code block
    which are optional?          a list of its parameters
    how is it imported?          a code block
    which methods has a class?   a list with one line for each
    what is in a module?         its documentation and its functions

Some conversations go on for two turns, some begin with a system message. What is drawn is drawn by
a checksum of the text and everything is sorted, so one Python installation gives one text.
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

from MaxDraft.errors import UserError

Message = dict[str, str]  # role, content
Record = dict[str, list[Message]]  # messages
Asked = tuple[tuple[str, ...], str]  # ways to ask for one thing, and its answer

# Modules that people know and that every supported Python has. The target sees each of their
# entries a dozen times, so it learns what they are and not only how text looks.
MODULES = """
    argparse ast asyncio.tasks asyncio.queues asyncio.locks base64 bisect calendar cmd code
    codecs collections colorsys configparser contextlib copy csv difflib dis fileinput filecmp
    fnmatch fractions ftplib functools getpass gettext glob graphlib gzip heapq hmac html
    inspect io ipaddress json keyword linecache locale logging mimetypes operator os pickle
    pkgutil platform posixpath pprint queue random sched secrets selectors shelve shlex shutil
    socket statistics string subprocess tempfile textwrap threading timeit tokenize traceback
    types typing urllib.parse uuid warnings weakref zipfile zipapp
"""
MOST_FUNCTIONS = 5  # of a module, the first in its source
MOST_CLASSES = 2
FEWEST_ENTRIES = 120  # there are twice as many where nothing is missing
SYSTEM_MESSAGES = (
    "You answer questions about the Python standard library.",
    "You are a short and exact guide to Python.",
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


class CorpusError(UserError):
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
    """A documented function, class or module, or a method: those stand only among `members`."""

    kind: str
    module: str
    name: str  # empty: the module itself
    summary: str
    parameters: tuple[Parameter, ...] = ()
    members: tuple[tuple[str, str], ...] = ()  # name and summary of what a class or module holds

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

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
    """Records in OpenAI's form, in an order that mixes entries; no two ask the same."""
    records = {}
    for entry in entries:
        for record in _about(entry):
            # A talk asks its first question in words that stand alone elsewhere: the whole counts.
            questions = [m["content"] for m in record["messages"] if m["role"] == "user"]
            records.setdefault(" ".join(questions), record)
    return [records[key] for key in sorted(records, key=lambda key: (_draw(key), key))]


# --------------------------------------------------------------------------- reading the library
def _sources(library: Path) -> Iterator[tuple[str, Path]]:
    for module in MODULES.split():
        plain = library.joinpath(*module.split("."))
        for path in (plain.with_suffix(".py"), plain / "__init__.py"):
            if path.is_file():
                yield module, path


def _entries(module: str, path: Path) -> Iterator[Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in the library's own strings
        tree = ast.parse(path.read_bytes(), filename=str(path))
    found = list(_definitions(tree, module))
    for kind, most in (("function", MOST_FUNCTIONS), ("class", MOST_CLASSES)):
        yield from [entry for entry in found if entry.kind == kind][:most]
    members = tuple((e.name, e.summary) for e in found if e.kind == "function")
    summary = _summary(tree)
    if summary and members:
        yield Entry("module", module, "", summary, members=members)


def _definitions(tree: ast.Module, module: str) -> Iterator[Entry]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(node, module, method=False)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [
                entry
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
                for entry in _function(inner, module, method=True)
            ]
            summary = _summary(node)
            if summary:
                members = tuple((method.name, method.summary) for method in methods)
                yield Entry("class", module, node.name, summary, members=members)


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, method: bool
) -> Iterator[Entry]:
    summary = _summary(node)
    parameters = _parameters(node.args, drop_first=method and not _static(node))
    short = len(parameters) <= 5 and sum(len(str(p)) for p in parameters) <= 60
    if summary and short and not node.name.startswith("_"):
        yield Entry("method" if method else "function", module, node.name, summary, parameters)


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
    """Every question about an entry alone, and conversations that put several one after another."""
    if entry.kind == "module":
        kinds, talks = [_module(entry)], []
    elif entry.kind == "class":
        kinds = [_what(entry)] + ([_methods(entry)] if entry.members else [])
        talks = [kinds] if entry.members else []
    else:
        kinds = [_what(entry), _signature(entry), _import(entry)]
        talks = [[kinds[0], kinds[1]], [kinds[2], kinds[0]]]
        if entry.parameters:
            kinds.append(_parameters_of(entry))
            talks.append([kinds[1], kinds[3]])
    for questions, answer in kinds:
        for question in questions:
            yield _record((question, answer))
    for talk in talks:
        turns = [(_pick(entry, questions), answer) for questions, answer in talk]
        yield _record(*turns)


def _what(entry: Entry) -> Asked:
    questions = (
        f"What does `{entry.path}` do?" if entry.kind == "function" else f"What is `{entry.path}`?",
        f"Explain `{entry.path}` to me.",
        f"What is `{entry.path}` good for?",
    )
    takes = " " + _takes(entry) if entry.kind == "function" else ""
    return questions, (
        f"`{entry.path}` is a {entry.kind} of the module `{entry.module}`. {entry.summary}{takes}"
    )


def _methods(entry: Entry) -> Asked:
    lines = [f"- `{name}`: {summary}" for name, summary in entry.members[:3]]
    more = len(entry.members) - len(lines)
    end = f"\n\nThere are {more} more." if more else ""
    return (
        f"Which methods has the class `{entry.path}`?",
        f"What can I call on a `{entry.path}`?",
    ), f"The class `{entry.path}` has these methods:\n\n" + "\n".join(lines) + end


def _module(entry: Entry) -> Asked:
    names = [f"`{name}`" for name, _ in entry.members[:4]]
    return (
        f"What is in the module `{entry.module}`?",
        f"Tell me about the module `{entry.module}`.",
    ), (
        f"The module `{entry.module}` is described like this: {entry.summary} "
        f"Among its functions: {_listed(names)}."
    )


def _signature(entry: Entry) -> Asked:
    return (
        f"How is `{entry.path}` called?",
        f"Show the signature of `{entry.path}`.",
    ), (
        f"The signature of `{entry.path}` is:\n\n"
        f"```python\ndef {entry.signature}\n```\n\n{_takes(entry)}"
    )


def _parameters_of(entry: Entry) -> Asked:
    lines = []
    for parameter in entry.parameters:
        if parameter.required:
            lines.append(f"- `{parameter.name}` is required.")
        elif parameter.default is None:
            lines.append(f"- `{parameter.name}` takes all that remain.")
        else:
            lines.append(f"- `{parameter.name}` is optional, the default is `{parameter.default}`.")
    return (
        f"Which parameters of `{entry.path}` are optional?",
        f"List the parameters of `{entry.path}`.",
    ), f"The parameters of `{entry.path}`:\n\n" + "\n".join(lines)


def _import(entry: Entry) -> Asked:
    names = ", ".join(p.name for p in entry.parameters if p.required)
    return (
        f"How do I import `{entry.path}`?",
        f"Write code that uses `{entry.path}`.",
    ), (
        f"Import `{entry.name}` from `{entry.module}` and call it:\n\n"
        f"```python\nfrom {entry.module} import {entry.name}\n\n"
        f"result = {entry.name}({names})\n```"
    )


def _takes(entry: Entry) -> str:
    count = len(entry.parameters)
    if count == 0:
        return "It takes no parameters."
    names = [f"`{parameter.name}`" for parameter in entry.parameters]
    return f"It takes {NUMBERS[count]} parameter{'s' if count > 1 else ''}: {_listed(names)}."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _record(*turns: tuple[str, str]) -> Record:
    messages = []
    draw = _draw(" ".join(question for question, _ in turns))
    if draw % 5 == 0:
        messages.append({"role": "system", "content": SYSTEM_MESSAGES[draw // 5 % 2]})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def _pick(entry: Entry, texts: Sequence[str]) -> str:
    return texts[_draw(entry.path) % len(texts)]


def _draw(text: str) -> int:
    """A number that depends on the text alone (hash() differs between processes)."""
    return zlib.crc32(text.encode())
