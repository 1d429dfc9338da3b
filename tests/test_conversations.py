"""What is read from files, and what is said about what cannot be."""

import json

import pytest
from data_helpers import record, write_lines

from MaxDraft.input_pipeline.conversations import (
    Message,
    ReadReport,
    parse_file_spec,
    read_conversations,
)
from MaxDraft.input_pipeline.errors import DataError

GOOD = record("Hello", "Hi")


def read(path):
    report = ReadReport()
    return list(read_conversations(path, report)), report


def test_both_spellings_of_a_conversation_are_read(tmp_path):
    sharegpt = {
        "id": "x",
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi"},
            {"from": "user", "value": "Bye"},
            {"from": "chatgpt", "value": "So long"},
        ],
    }
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    openai = {"messages": [{"role": "user", "content": parts}, *GOOD["messages"][1:]]}
    found, report = read(write_lines(tmp_path / "a.jsonl", [sharegpt, openai]))
    assert found[0].messages == (
        Message("system", "Be kind."),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", "Bye"),
        Message("assistant", "So long"),
    )
    assert found[1].messages == (Message("user", "Good day"), Message("assistant", "Hi"))
    assert [(c.file, c.line) for c in found] == [(str(tmp_path / "a.jsonl"), n) for n in (1, 2)]
    assert (report.records, report.skipped) == (2, {})


def test_blank_lines_windows_lines_and_a_byte_order_mark_are_accepted(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    found, report = read(path)
    assert [c.line for c in found] == [1, 4]
    assert (report.records, report.skipped_records) == (2, 0)


def said(*messages, key="messages", role="role", content="content"):
    return {key: [{role: r, content: c} for r, c in messages]}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        ("3", "not a JSON object"),
        ({"text": "x"}, "neither 'messages' nor 'conversations'"),
        ({"messages": []}, "no messages"),
        ({"messages": None}, "no messages"),
        ({"messages": ["x"]}, "a message without 'role'"),
        ({"conversations": [{"value": "x"}]}, "a message without 'from'"),
        (said(("tool", "x")), "unknown role 'tool'"),
        (said(("user", "x"), ("assistant", " \n")), "empty content"),
        (said(("user", "x"), ("assistant", None)), "empty content"),
        (said(("user", "x"), ("assistant", [])), "empty content"),
        (said(("user", 3), ("assistant", "x")), "content that is not text"),
        (said(("user", [{"type": "image_url"}])), "content with parts that are not text"),
        (
            '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
            "content with half a surrogate pair",
        ),
        (said(("system", "x"), ("user", "x")), "no assistant message"),
    ],
)
def test_a_record_that_cannot_be_used_is_counted_with_file_and_line(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, line, GOOD])
    found, report = read(path)
    assert [c.line for c in found] == [1, 3]
    assert report.records == 3
    assert {r: (s.count, s.examples) for r, s in report.skipped.items()} == {
        reason: (1, [f"{path}:2"])
    }
    assert ReadReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_too_many_unusable_records_stop_the_run_and_say_which(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["{"] * 5 + [{"messages": []}] + [GOOD] * 4)
    _, report = read(path)
    report.check_share(0.6, "a.jsonl")
    with pytest.raises(DataError) as error:
        report.check_share(0.59, "a.jsonl")
    text = str(error.value)
    assert "6 of 10 records (60.0%) cannot be used, more than max_skipped_fraction=0.59" in text
    assert f"5 x not JSON ({path}:1, {path}:2, {path}:3, ...)" in text
    assert f"1 x no messages ({path}:6)" in text


def test_reasons_are_counted_under_few_names_whatever_the_data(tmp_path):
    lines = [said((f"role {n}", "x")) for n in range(50)]
    _, report = read(write_lines(tmp_path / "a.jsonl", lines))
    assert report.skipped_records == 50
    assert len(report.reasons()) == 21
    assert report.reasons()[0].startswith("30 x other reasons")


def test_files_without_records_are_an_error(tmp_path):
    _, report = read(write_lines(tmp_path / "a.jsonl", ["", ""]))
    with pytest.raises(DataError, match="hold no records"):
        report.check_share(1.0, "a.jsonl")


@pytest.mark.parametrize("indent", [None, 2])
def test_one_json_array_says_how_to_convert_it(tmp_path, indent):
    path = tmp_path / "all.json"
    path.write_text(json.dumps([GOOD, GOOD], indent=indent), encoding="utf-8")
    with pytest.raises(DataError, match=r"jq -c '\.\[\]' all\.json > all\.jsonl"):
        read(path)


def test_a_file_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        read(tmp_path / "gone.jsonl")


def test_a_file_specification_gives_sorted_files_and_weights(tmp_path):
    for name in ("b1.jsonl", "a2.jsonl", "a1.jsonl", "c,d.jsonl"):
        write_lines(tmp_path / name, [GOOD])
    (tmp_path / "a3.jsonl").mkdir()  # a folder is no file
    spec = f"{tmp_path}/a*.jsonl , 0.5; {tmp_path}/b1.jsonl; {tmp_path}/c,d.jsonl;"
    found = parse_file_spec(spec)
    assert [[p.name for p in one.paths] for one in found] == [
        ["a1.jsonl", "a2.jsonl"],
        ["b1.jsonl"],
        ["c,d.jsonl"],
    ]
    assert [one.weight for one in found] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/x*.jsonl", "no file matches"),
        ("{}/a.jsonl,0", "the weight is 0, and must be above 0"),
        ("{}/a.jsonl,-1", "the weight is -1"),
        ("{}/a.jsonl,nan", "the weight is nan"),
        ("{}/a.jsonl,{}/a.jsonl", "is not a weight; write GLOB,WEIGHT"),
        ("{}/a.jsonl;{}/*.jsonl", "name it once, with a weight"),
        (" ; ", "set grain_train_files"),
    ],
)
def test_a_wrong_file_specification_says_what_to_write(tmp_path, spec, message):
    write_lines(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(DataError, match=message):
        parse_file_spec(spec.replace("{}", str(tmp_path)))
