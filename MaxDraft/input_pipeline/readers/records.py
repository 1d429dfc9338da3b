"""One JSON record -> the messages of a conversation, by the columns that it has.

    {"messages": [{"role": "user", "content": "..."}, ...]}           OpenAI
    {"conversations": [{"from": "human", "value": "..."}, ...]}       ShareGPT

Both spellings of a message are read under both columns. A record that cannot be used never stops
the reading: the report counts it under its reason. A field that would change what serving sees
(tools, tool calls, images, a reply's weight) is a reason too; other fields are counted by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from MaxDraft.input_pipeline.conversations import Conversation, Message
from MaxDraft.input_pipeline.read_report import ReadReport
from MaxDraft.input_pipeline.readers.files import MAX_LINE_BYTES, read_lines

# What data sets call the three roles, and what chat templates call them.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
MESSAGE_COLUMNS = ("messages", "conversations")
SYSTEM_COLUMNS = ("system", "system_prompt")
ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# Without these a conversation would be rendered into another prompt than serving saw.
MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")
REFUSED_COLUMNS = ("tools", "functions", "documents", "chat_template_kwargs", *MEDIA_FIELDS)
REFUSED_FIELDS = ("tool_calls", "function_call", "tool_call_id", *MEDIA_FIELDS)
# Which replies are learnt: 0 or false excludes one. They mean nothing on other messages.
LOSS_FIELDS = ("weight", "train", "loss", "loss_mask")
# Encoding takes time and memory in proportion to the text, about 200 bytes a character. Two million
# characters are about 500,000 tokens, beyond the positions of the targets there are.
MAX_CHARACTERS = 1 << 21
# Templates may look at all messages for each message, which takes the square of their number.
MAX_MESSAGES = 4096
EMPTY = (None, "", "[]", "{}", [], {})

LEADING_REPLY = "an assistant turn before the first user turn is left out"
CUT_AT_EMPTY = "the conversation ends before a message without content"
NO_SYSTEM = "a system message without content is left out"


class UnusableError(Exception):
    """Why a record is skipped."""


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A usable record."""

    messages: tuple[Message, ...]
    changes: tuple[str, ...]  # what of the conversation is not used
    ignored_fields: frozenset[str]


def read_conversations(path: Path, report: ReadReport) -> Iterator[Conversation]:
    """The usable conversations of a file, in order; `report` counts all of its records.

    DataError: see read_lines.
    """
    for number, line in read_lines(path):
        report.records += 1
        try:
            parsed = parse_record(line)
        except UnusableError as reason:
            report.skip(str(reason), str(path), number)
            continue
        for reason in parsed.changes:
            report.change(reason, str(path), number)
        report.ignore_fields(parsed.ignored_fields)
        yield Conversation(parsed.messages, str(path), number)


def parse_record(line: bytes | None) -> Parsed:
    """One line, None for one that was too long to keep; UnusableError: why it cannot be used."""
    record = _parse_json(line)
    column = next((name for name in MESSAGE_COLUMNS if record.get(name) not in EMPTY), None)
    if column is None:
        if any(name in record for name in MESSAGE_COLUMNS):
            raise UnusableError("no messages")
        raise UnusableError("neither 'messages' nor 'conversations'")
    _refuse(record, REFUSED_COLUMNS, "a record")
    entries = record[column]
    if not isinstance(entries, list):
        raise UnusableError("no messages")
    if len(entries) > MAX_MESSAGES:
        raise UnusableError(f"more than {MAX_MESSAGES} messages")
    ignored = {
        name
        for name, value in record.items()
        if name not in (column, *SYSTEM_COLUMNS, *REFUSED_COLUMNS) and value not in EMPTY
    }
    messages = _with_system([_parse_message(entry, ignored) for entry in entries], record)
    if sum(len(message.content) + len(message.reasoning) for message in messages) > MAX_CHARACTERS:
        raise UnusableError(f"more than {MAX_CHARACTERS} characters")
    messages, changes = _usable_part(messages)
    return Parsed(tuple(messages), tuple(changes), frozenset(ignored))


def _refuse(fields: dict[str, Any], names: tuple[str, ...], owner: str) -> None:
    """UnusableError for the first of `names` that holds anything; false and "null" are nothing."""
    for name in names:
        value = fields.get(name)
        if value is not False and value not in (*EMPTY, "null"):
            raise UnusableError(f"{owner} with {name!r}, which is not supported")


def _parse_json(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise UnusableError(f"a line of more than {MAX_LINE_BYTES} bytes")
    try:
        # Numbers mean nothing here, and as integers Python refuses those of many digits.
        record = json.loads(line.decode("utf-8"), parse_int=float)
    except UnicodeDecodeError as error:
        raise UnusableError("not UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnusableError("not JSON") from error
    if not isinstance(record, dict):
        raise UnusableError("not a JSON object")
    return record


def _with_system(messages: list[Message], record: dict[str, Any]) -> list[Message]:
    """A system prompt that stands beside the messages becomes the first of them."""
    for name in SYSTEM_COLUMNS:
        if record.get(name) in EMPTY:
            continue
        system = Message("system", _parse_text(record[name]))
        if not system.content.strip():
            continue
        if messages[0].role != "system":
            messages = [system, *messages]
        elif messages[0] != system:
            raise UnusableError(f"a record with {name!r} and another system message")
    return messages


def _usable_part(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """The messages without those that serving would never have seen, and what was left out."""
    changes = []
    spoken = [m for m in messages if m.role != "system" or m.content.strip()]
    if len(spoken) < len(messages):
        changes.append(NO_SYSTEM)
    end = next((i for i, m in enumerate(spoken) if not m.content.strip()), len(spoken))
    if end < len(spoken):
        changes.append(CUT_AT_EMPTY)
    usable, asked = [], False
    for message in spoken[:end]:
        asked |= message.role == "user"
        if message.role == "assistant" and not asked:
            if LEADING_REPLY not in changes:
                changes.append(LEADING_REPLY)
        else:
            usable.append(message)
    if all(message.role != "assistant" for message in usable):
        if CUT_AT_EMPTY in changes:
            raise UnusableError("empty content")
        if LEADING_REPLY in changes:
            raise UnusableError("no assistant message after a user message")
        raise UnusableError("no assistant message")
    return usable, changes


def _parse_message(entry: Any, ignored: set[str]) -> Message:
    """One message; adds the names of fields that are not read to `ignored`."""
    if not isinstance(entry, dict):
        raise UnusableError("a message that is not a JSON object")
    role = _parse_role(entry)
    _refuse(entry, REFUSED_FIELDS, "a message")
    reasoning = ""
    read = {*ROLE_FIELDS, *CONTENT_FIELDS, *REFUSED_FIELDS}
    if role == "assistant":
        for name in LOSS_FIELDS:
            if entry.get(name) not in (None, 1):
                raise UnusableError(f"a message with {name!r} other than 1, which is not supported")
        read.update(LOSS_FIELDS, REASONING_FIELDS)
        texts = {_parse_text(entry[f]) for f in REASONING_FIELDS if entry.get(f) not in EMPTY}
        if len(texts) > 1:
            raise UnusableError("a message with several different fields of reasoning")
        reasoning = texts.pop() if texts else ""
    ignored.update(
        f"{name} of a message" for name in entry if name not in read and entry[name] not in EMPTY
    )
    return Message(role, _parse_content(entry), reasoning)


def _parse_role(entry: dict[str, Any]) -> str:
    """The role that all role fields of a message agree on."""
    values = [entry[name] for name in ROLE_FIELDS if entry.get(name) not in EMPTY]
    if not values:
        raise UnusableError("a message without 'role' or 'from'")
    if not all(isinstance(value, str) for value in values):
        raise UnusableError("a role that is not text")
    names = [value.strip().lower() for value in values]
    for name in names:
        if name not in ROLES:
            # Roles are few in good data; in other data each would be a reason of its own.
            raise UnusableError(f"unknown role {name[:24]!r}")
    if len({ROLES[name] for name in names}) > 1:
        raise UnusableError("a message whose 'role' and 'from' disagree")
    return ROLES[names[0]]


def _parse_content(entry: dict[str, Any]) -> str:
    """The text of the one content field that has any, or of several that have the same one."""
    texts = {_parse_text(entry.get(name)) for name in CONTENT_FIELDS}
    texts = {text for text in texts if text.strip()}
    if len(texts) > 1:
        raise UnusableError("a message with several different fields of content")
    return texts.pop() if texts else ""


def _parse_text(content: Any) -> str:
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
            raise UnusableError("content with parts that are not text")
        text = "".join(part["text"] for part in content)
    else:
        raise UnusableError("content that is not text")
    # JSON may escape half of a surrogate pair, which no tokenizer and no file can hold.
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UnusableError("content with half a surrogate pair")
    return text
