"""Conversations out of JSONL files; what cannot be used is counted, with file and line.

    {"messages": [{"role": "user", "content": "..."}, ...]}           OpenAI
    {"conversations": [{"from": "human", "value": "..."}, ...]}       ShareGPT

One record stands in one line. A record that cannot be used never stops the reading: the report
counts it under its reason, and `check_share` stops the run where there are too many of them.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from MaxDraft.input_pipeline.errors import DataError

# What data sets call the three roles, and what chat templates call them.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
EXAMPLES_KEPT = 3  # of each reason
REASONS_KEPT = 20  # a template's own message may differ from record to record


@dataclasses.dataclass(frozen=True)
class Message:
    """role: system, user or assistant."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages of which at least one is the assistant's, and where they were read."""

    messages: tuple[Message, ...]
    file: str
    line: int  # 1-based


@dataclasses.dataclass(frozen=True)
class FileSet:
    """Files that share a weight: how many copies of each conversation an epoch holds."""

    pattern: str
    paths: tuple[Path, ...]
    weight: float


@dataclasses.dataclass
class Skipped:
    """Records left out for one reason."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)  # file:line of the first few


@dataclasses.dataclass
class ReadReport:
    """How many records were read (blank lines are none), and how many of them cannot be used."""

    records: int = 0
    skipped: dict[str, Skipped] = dataclasses.field(default_factory=dict)

    @property
    def skipped_records(self) -> int:
        return sum(skipped.count for skipped in self.skipped.values())

    def skip(self, reason: str, file: str, line: int) -> None:
        """Counts a record that was read and cannot be used."""
        if reason not in self.skipped and len(self.skipped) >= REASONS_KEPT:
            reason = "other reasons"
        skipped = self.skipped.setdefault(reason, Skipped())
        skipped.count += 1
        if len(skipped.examples) < EXAMPLES_KEPT:
            skipped.examples.append(f"{file}:{line}")

    def reasons(self) -> list[str]:
        """One line for each reason, the most frequent first."""
        ordered = sorted(self.skipped.items(), key=lambda item: (-item[1].count, item[0]))
        return [
            f"{skipped.count} x {reason} ({', '.join(skipped.examples)}"
            f"{', ...' if skipped.count > len(skipped.examples) else ''})"
            for reason, skipped in ordered
        ]

    def check_share(self, max_skipped_fraction: float, files: str) -> None:
        """DataError where more than this share of the records read cannot be used."""
        if self.records == 0:
            raise DataError(f"{files}: the files hold no records, only blank lines or nothing")
        share = self.skipped_records / self.records
        if share > max_skipped_fraction:
            raise DataError(
                f"{files}: {self.skipped_records} of {self.records} records ({share:.1%}) cannot "
                f"be used, more than max_skipped_fraction={max_skipped_fraction:g} allows:\n  "
                + "\n  ".join(self.reasons())
                + "\nRepair the files, or raise max_skipped_fraction"
            )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ReadReport:
        skipped = {reason: Skipped(**one) for reason, one in value["skipped"].items()}
        return cls(value["records"], skipped)


class _UnusableError(Exception):
    """Why a record is skipped."""


def parse_file_spec(spec: str) -> list[FileSet]:
    """ "glob[,weight][;glob[,weight]...]" -> one FileSet each, its paths sorted.

    A weight is the number of copies per epoch: 2 is twice, 0.5 another random half each epoch.
    DataError: a pattern without files, a file in two patterns, a weight that is not above 0.
    """
    found, seen = [], {}
    for part in filter(None, map(str.strip, spec.split(";"))):
        pattern, weight = _split_weight(part)
        paths = tuple(path for path in _matching(pattern) if path.is_file())
        if not paths:
            raise DataError(f"no file matches {pattern!r}; is the path right, seen from here?")
        for path in paths:
            if seen.setdefault(path.resolve(), len(found)) != len(found):
                raise DataError(
                    f"{path} is in two parts of {spec!r}; name it once, with a weight: "
                    f"{path},2 reads it twice per epoch"
                )
        found.append(FileSet(pattern, paths, weight))
    if not found:
        raise DataError("no data files are given; set grain_train_files=GLOB of .jsonl files")
    return found


def read_conversations(path: Path, report: ReadReport) -> Iterator[Conversation]:
    """The usable conversations of a JSONL file, in order; `report` counts all of its records.

    Blank lines, CRLF and a byte order mark are accepted. DataError: the file cannot be opened, or
    is one JSON array instead of lines.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                text = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                text = text.strip()
                if not text:
                    continue
                if _opens_array(text, number):
                    raise DataError(
                        f"{path} is one JSON array; one record per line is read here. Convert it "
                        f"with: jq -c '.[]' {path.name} > {path.stem}.jsonl"
                    )
                report.records += 1
                try:
                    yield Conversation(_messages(text), str(path), number)
                except _UnusableError as reason:
                    report.skip(str(reason), str(path), number)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _opens_array(text: bytes, number: int) -> bool:
    """A first line that opens a JSON array of records."""
    return number == 1 and text.startswith(b"[") and text[1:].lstrip()[:1] in (b"", b"{")


def _matching(pattern: str) -> list[Path]:
    # Path.glob takes no absolute patterns.
    return sorted(map(Path, glob.glob(str(Path(pattern).expanduser()), recursive=True)))  # noqa: PTH207


def _split_weight(part: str) -> tuple[str, float]:
    """The text after the last comma is the weight, unless it is no number: then all is a glob."""
    pattern, comma, text = part.rpartition(",")
    if not comma:
        return part, 1.0
    try:
        weight = float(text)
    except ValueError as error:
        if _matching(part):
            return part, 1.0
        raise DataError(
            f"{part!r}: {text.strip()!r} after the comma is not a weight; write GLOB,WEIGHT with "
            f"a number, and separate several globs with ;"
        ) from error
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(
            f"{part!r}: the weight is {text.strip()}, and must be above 0: 2 reads the files twice "
            f"per epoch, 0.5 another random half of them each epoch"
        )
    return pattern.strip(), weight


def _messages(line: bytes) -> tuple[Message, ...]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _UnusableError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _UnusableError("not JSON") from error
    if not isinstance(record, dict):
        raise _UnusableError("not a JSON object")
    if "messages" in record:
        entries, role_key, content_key = record["messages"], "role", "content"
    elif "conversations" in record:
        entries, role_key, content_key = record["conversations"], "from", "value"
    else:
        raise _UnusableError("neither 'messages' nor 'conversations'")
    if not isinstance(entries, list) or not entries:
        raise _UnusableError("no messages")
    messages = tuple(_message(entry, role_key, content_key) for entry in entries)
    if all(message.role != "assistant" for message in messages):
        raise _UnusableError("no assistant message")
    return messages


def _message(entry: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(entry, dict) or not isinstance(entry.get(role_key), str):
        raise _UnusableError(f"a message without {role_key!r}")
    role = ROLES.get(entry[role_key].strip().lower())
    if role is None:
        # Roles are few in sane data; in insane data each would be a reason of its own.
        raise _UnusableError(f"unknown role {entry[role_key][:24]!r}")
    content = _text(entry.get(content_key))
    if not content.strip():
        raise _UnusableError("empty content")
    return Message(role, content)


def _text(content: Any) -> str:
    """A string, or OpenAI's list of text parts joined."""
    if content is None:
        return ""
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        if not all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        ):
            raise _UnusableError("content with parts that are not text")
        text = "".join(part["text"] for part in content)
    else:
        raise _UnusableError("content that is not text")
    # JSON may escape half of a surrogate pair, which no tokenizer and no file can hold.
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise _UnusableError("content with half a surrogate pair")
    return text
