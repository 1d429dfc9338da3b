"""What is read from files and records, and how what cannot be read is counted and named."""

import gzip
import json
import re
import subprocess
import time

import pytest
from data_helpers import record, write_lines

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import DataError
from MaxDraft.input_pipeline.read_report import ReadReport
from MaxDraft.input_pipeline.readers import files, records
from MaxDraft.input_pipeline.readers.records import (
    CUT_AT_EMPTY,
    LEADING_REPLY,
    NO_SYSTEM,
    read_conversations,
)

GOOD = record("Hello", "Hi")
TURNS = GOOD["messages"]


def read(path):
    report = ReadReport()
    return list(read_conversations(path, report)), report


def read_one(tmp_path, line):
    """The messages of one record as (role, content), and the report."""
    conversations, report = read(write_lines(tmp_path / "one.jsonl", [line]))
    assert len(conversations) <= 1
    return [(m.role, m.content) for c in conversations for m in c.messages], report


def openai(*messages, **columns):
    return {"messages": [{"role": r, "content": c} for r, c in messages], **columns}


def sharegpt(*messages, **columns):
    return {"conversations": [{"from": r, "value": c} for r, c in messages], **columns}


# --------------------------------------------------------------------------------- record forms
def test_both_spellings_of_a_conversation_are_read(tmp_path):
    first = sharegpt(
        ("system", "Be kind."),
        ("human", "Hello"),
        ("gpt", "Hi"),
        ("user", "Bye"),
        ("chatgpt", "So long"),
    )
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    second = {"messages": [{"role": "user", "content": parts}, *TURNS[1:]]}
    path = write_lines(tmp_path / "a.jsonl", [first, second])
    conversations, report = read(path)
    assert conversations[0].messages == (
        Message("system", "Be kind."),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "Bye"),
        Message("assistant", "So long"),
    )
    assert conversations[1].messages == (Message("user", "Good day"), Message("assistant", "Hi"))
    assert [(c.file, c.line) for c in conversations] == [(str(path), 1), (str(path), 2)]
    assert (report.records, report.skipped, report.changed) == (2, {}, {})


HELLO = [("user", "Hello"), ("assistant", "Hi")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"conversations": TURNS}, HELLO),  # as SpecForge prepares files
        ({"messages": sharegpt(("human", "Hello"), ("gpt", "Hi"))["conversations"]}, HELLO),
        (openai(*HELLO, conversations=None), HELLO),
        ({"messages": None, **sharegpt(("human", "Hello"), ("bing", "Hi"))}, HELLO),
        (sharegpt(("human", "Hello"), ("bard", "Hi")), HELLO),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 1, "train": True}]}, HELLO),
        ({"messages": [TURNS[0], {**TURNS[1], "from": "gpt", "value": "Hi"}]}, HELLO),
        ({"messages": [TURNS[0], {**TURNS[1], "from": "", "value": ""}]}, HELLO),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "", "value": "Hi"}]}, HELLO),
        (openai(*HELLO, system="Be kind."), [("system", "Be kind."), *HELLO]),
        (sharegpt(("human", "Hello"), ("gpt", "Hi"), system=""), HELLO),
        (
            openai(("system", "Be kind."), *HELLO, system="Be kind."),
            [("system", "Be kind."), *HELLO],
        ),
        ('{"id": ' + "7" * 5000 + ', "messages": ' + json.dumps(TURNS) + "}", HELLO),
    ],
)
def test_every_form_of_a_record_gives_its_messages(tmp_path, line, expected):
    messages, report = read_one(tmp_path, line)
    assert messages == expected
    assert (report.skipped, report.changed) == ({}, {})


@pytest.mark.parametrize(
    ("line", "expected", "reason"),
    [
        (sharegpt(("gpt", "Welcome"), ("human", "Hello"), ("gpt", "Hi")), HELLO, LEADING_REPLY),
        (
            openai(("system", "Be kind."), ("assistant", "Welcome"), *HELLO),
            [("system", "Be kind."), *HELLO],
            LEADING_REPLY,
        ),
        (openai(*HELLO, ("user", " "), ("assistant", "What?")), HELLO, CUT_AT_EMPTY),
        (openai(*HELLO, ("user", "More"), ("assistant", "")), [*HELLO, ("user", "More")], None),
        (openai(("system", ""), *HELLO), HELLO, NO_SYSTEM),
    ],
)
def test_the_usable_part_of_a_record_is_kept_and_counted(tmp_path, line, expected, reason):
    messages, report = read_one(tmp_path, line)
    assert messages == expected
    assert report.skipped == {}
    assert {name: r.count for name, r in report.changed.items()} == {reason or CUT_AT_EMPTY: 1}


def test_reasoning_beside_the_content_is_kept(tmp_path):
    for field in ("reasoning_content", "thinking", "reasoning"):
        line = {"messages": [TURNS[0], {**TURNS[1], field: "I greet."}]}
        (conversation,), report = read(write_lines(tmp_path / "a.jsonl", [line]))
        assert conversation.messages[1] == Message("assistant", "Hi", "I greet.")
        assert report.ignored_fields == {}


def test_fields_that_are_not_read_are_counted_by_name(tmp_path):
    lines = [
        {"id": n, "source": "x", "score": None, "messages": [{**TURNS[0], "name": "Bo"}, TURNS[1]]}
        for n in range(1, 4)
    ]
    _, report = read(write_lines(tmp_path / "a.jsonl", [*lines, GOOD]))
    assert report.ignored_fields == {"id": 3, "source": 3, "name of a message": 3}
    many = [{f"key{n}": 1, **GOOD} for n in range(60)]
    _, report = read(write_lines(tmp_path / "b.jsonl", many))
    assert len(report.ignored_fields) == 41 and report.ignored_fields["other fields"] == 20


@pytest.mark.parametrize("field", ["weight", "train", "loss", "loss_mask"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_a_loss_switch_counts_on_replies_only(tmp_path, role, field):
    line = openai(("system", "Be kind."), *HELLO)
    next(m for m in line["messages"] if m["role"] == role)[field] = 0
    messages, report = read_one(tmp_path, line)
    assert messages == [("system", "Be kind."), *HELLO]
    assert (report.skipped, report.ignored_fields) == ({}, {f"{field} of a message": 1})


@pytest.mark.parametrize("name", ["tools", "functions", "documents", "images", "tool_calls"])
@pytest.mark.parametrize("nothing", [False, None, "null", "", "[]", [], {}])
def test_tools_and_images_that_hold_nothing_are_no_fault(tmp_path, name, nothing):
    lines = [{**GOOD, name: nothing}] if name != "tool_calls" else []
    if name in records.REFUSED_FIELDS:
        lines.append(with_field(**{name: nothing}))
    conversations, report = read(write_lines(tmp_path / "a.jsonl", lines))
    assert len(conversations) == len(lines)
    assert (report.skipped, report.ignored_fields) == ({}, {})


@pytest.mark.parametrize("name", ["image", "images", "video", "videos", "audio", "audios"])
def test_records_with_images_or_sound_are_skipped(tmp_path, name):
    lines = [{**GOOD, name: ["cat.png"]}, with_field(**{name: "cat.png"})]
    conversations, report = read(write_lines(tmp_path / "a.jsonl", lines))
    assert conversations == []
    assert set(report.skipped) == {
        f"a record with {name!r}, which is not supported",
        f"a message with {name!r}, which is not supported",
    }


def test_a_record_counts_once_among_the_other_fields(tmp_path):
    keys = {f"key{n:06}" + "x" * 70: 1 for n in range(20_000)}
    same_start = {"z" * 70 + str(n): 1 for n in range(2)}
    lines = [{**GOOD, **same_start}, {**GOOD, **keys}]
    _, report = read(write_lines(tmp_path / "a.jsonl", lines))
    assert len(report.ignored_fields) == 41
    assert max(map(len, report.ignored_fields)) == 60
    assert set(report.ignored_fields.values()) == {1}


def with_field(**fields):
    return {"messages": [TURNS[0], {**TURNS[1], **fields}]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        ("3", "not a JSON object"),
        ({"text": "x"}, "neither 'messages' nor 'conversations'"),
        ({"messages": []}, "no messages"),
        ({"messages": None}, "no messages"),
        ({"messages": "x"}, "no messages"),
        ({"messages": ["x"]}, "a message that is not a JSON object"),
        ({"conversations": [{"value": "x"}]}, "a message without 'role' or 'from'"),
        (openai(("tool", "x")), "unknown role 'tool'"),
        (openai(("user", "x"), ("assistant", " \n")), "empty content"),
        (openai(("user", "x"), ("assistant", None)), "empty content"),
        (openai(("user", "x"), ("assistant", [])), "empty content"),
        (openai(("user", 3), ("assistant", "x")), "content that is not text"),
        (openai(("user", [{"type": "image_url"}])), "content with parts that are not text"),
        (
            '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
            "content with half a surrogate pair",
        ),
        (openai(("system", "x"), ("user", "x")), "no assistant message"),
        (openai(("assistant", "x"), ("user", "x")), "no assistant message after a user message"),
        (with_field(tool_calls=[{}]), "a message with 'tool_calls', which is not supported"),
        (
            with_field(content=None, tool_calls=[{}]),
            "a message with 'tool_calls', which is not supported",
        ),
        (with_field(weight=0), "a message with 'weight' other than 1, which is not supported"),
        (with_field(train=False), "a message with 'train' other than 1, which is not supported"),
        (with_field(loss=False), "a message with 'loss' other than 1, which is not supported"),
        (
            with_field(loss_mask=0),
            "a message with 'loss_mask' other than 1, which is not supported",
        ),
        ({**GOOD, "tools": "[{}]"}, "a record with 'tools', which is not supported"),
        (
            openai(("system", "a"), *HELLO, system="b"),
            "a record with 'system' and another system message",
        ),
        (openai(*HELLO * 2100), "more than 4096 messages"),
        (with_field(**{"from": "human"}), "a message whose 'role' and 'from' disagree"),
        (with_field(**{"from": "tool"}), "unknown role 'tool'"),
        (with_field(**{"from": 3}), "a role that is not text"),
        (with_field(value="Ho"), "a message with several different fields of content"),
        (
            with_field(thinking="a", reasoning="b"),
            "a message with several different fields of reasoning",
        ),
    ],
)
def test_an_unusable_record_is_counted_with_file_and_line(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, line, GOOD])
    conversations, report = read(path)
    assert [c.line for c in conversations] == [1, 3]
    assert report.records == 3
    assert {r: (s.count, s.examples) for r, s in report.skipped.items()} == {
        reason: (1, [f"{path}:2"])
    }
    assert ReadReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_enormous_records_are_skipped_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ("x" * 3_000_000, "x" * 20_000_000)
    write_lines(path, [GOOD, record("Hello", texts[0]), record("Hello", texts[1]), GOOD])
    start = time.monotonic()
    conversations, report = read(path)
    assert time.monotonic() - start < 5
    assert [c.line for c in conversations] == [1, 4]
    assert {name: one.examples for name, one in report.skipped.items()} == {
        f"more than {records.MAX_CHARACTERS} characters": [f"{path}:2"],
        f"a line of more than {files.MAX_LINE_BYTES} bytes": [f"{path}:3"],
    }


# ----------------------------------------------------------------------------------- the report
def test_too_many_unusable_records_stop_the_run(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["{"] * 5 + [{"messages": []}] + [GOOD] * 4)
    _, report = read(path)
    report.check_share(0.6, "a.jsonl")
    with pytest.raises(DataError) as error:
        report.check_share(0.59, "a.jsonl")
    text = str(error.value)
    assert "6 of 10 records (60.0%) cannot be used, more than max_skipped_fraction=0.59" in text
    assert f"5 x not JSON ({path}:1, {path}:2, {path}:3, ...)" in text
    assert f"1 x no messages ({path}:6)" in text


def test_reasons_are_counted_under_few_names(tmp_path):
    lines = [openai((f"role {n}", "x")) for n in range(50)]
    _, report = read(write_lines(tmp_path / "a.jsonl", lines))
    assert report.skipped_records == 50
    assert len(report.skip_lines()) == 21
    assert report.skip_lines()[0].startswith("30 x other reasons")
    report.skip("x" * 10_000, "a.jsonl", 1)
    assert max(map(len, report.skipped)) < 400


def test_files_without_records_are_an_error(tmp_path):
    _, report = read(write_lines(tmp_path / "a.jsonl", ["", ""]))
    with pytest.raises(DataError, match="hold no records"):
        report.check_share(1.0, "a.jsonl")


# ------------------------------------------------------------------------------------ file forms
def test_blank_lines_windows_lines_and_a_bom_are_accepted(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    conversations, report = read(path)
    assert [c.line for c in conversations] == [1, 4]
    assert (report.records, report.skipped_records) == (2, 0)


def test_gzip_is_read_whatever_its_name(tmp_path):
    plain = write_lines(tmp_path / "a.jsonl", [GOOD, "{", GOOD])
    packed = tmp_path / "b.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    conversations, report = read(packed)
    assert [c.line for c in conversations] == [1, 3]
    assert (report.records, report.skipped_records) == (3, 1)


def test_a_damaged_gzip_is_an_error(tmp_path):
    plain = write_lines(tmp_path / "a.jsonl", [record(str(n), "Hi") for n in range(500)])
    whole = gzip.compress(plain.read_bytes())
    for damaged in (whole[:-20], whole[: len(whole) // 2] + bytes(40), whole[:12]):
        packed = tmp_path / "b.jsonl.gz"
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match="is damaged or cut off behind line"):
            read(packed)


@pytest.mark.parametrize("indent", [None, 2])
def test_the_cure_for_a_json_array_destroys_no_file(tmp_path, indent):
    path = tmp_path / "all chats.jsonl"
    text = json.dumps([GOOD, GOOD], indent=indent)
    path.write_text(text, encoding="utf-8")
    (tmp_path / "all chats.lines.jsonl").write_text("precious")
    with pytest.raises(DataError, match="is one JSON array") as error:
        read(path)
    command = re.search(r"Convert it with: (.*)$", str(error.value))[1]
    assert command.startswith("jq -c '.[]' ")
    # Stands for jq: writes what the command's redirection is given.
    subprocess.run(["sh", "-c", "jq() { echo made; }; " + command], check=True, cwd=tmp_path)
    assert path.read_text() == text
    assert (tmp_path / "all chats.lines.jsonl").read_text() == "precious"
    assert (tmp_path / "all chats.lines-2.jsonl").read_text() == "made\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((json.dumps(GOOD) + "\n").encode("utf-16"), "UTF-16 text, .*iconv -f UTF-16 -t UTF-8"),
        ((json.dumps(GOOD) + "\n").encode("utf-16-be"), "UTF-16 text, .*iconv -f UTF-16BE"),
        (b"PAR1\x15\x04", "a Parquet file, .*pandas.read_parquet"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\x28\xb5\x2f\xfd\x04", "compressed with zstd, .*zstd -d .*a.jsonl -o .*a.lines.jsonl"),
        (b"PK\x03\x04", "a zip archive, .*unzip -p"),
    ],
)
def test_a_file_of_another_form_is_one_error_with_its_cure(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_file_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        read(tmp_path / "gone.jsonl")
