"""Whatever the bytes, the readers and the encoder end soon, with a result or with our own error."""

import contextlib
import gzip
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    CHATML,
    HEADERS,
    INSTRUCT,
    LAST_TURN_THINKS,
    MARKED,
    SPECIAL,
    make_encoder,
    make_tokenizer,
    record,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from MaxDraft.input_pipeline.conversations import Message
from MaxDraft.input_pipeline.errors import DataError, TemplateError
from MaxDraft.input_pipeline.file_spec import parse_file_spec
from MaxDraft.input_pipeline.read_report import ReadReport
from MaxDraft.input_pipeline.readers.records import UnusableError, parse_record, read_conversations
from MaxDraft.input_pipeline.template_renderer import TemplateRenderer
from MaxDraft.input_pipeline.tokenizer_files import load_tokenizer

COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
ENCODERS = [make_encoder(t) for t in (CHATML, HEADERS, INSTRUCT, LAST_TURN_THINKS, MARKED)]
COLUMNS = "messages conversations system tools id".split()  # noqa: SIM905
FIELDS = "role from content value reasoning_content thinking tool_calls weight".split()  # noqa: SIM905
VALUE_WORDS = "user assistant human gpt text type".split()  # noqa: SIM905
NAMES = st.sampled_from(COLUMNS + FIELDS + VALUE_WORDS)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | NAMES
    | st.text(max_size=20)
    | st.sampled_from(["", " ", "\ud800", "\x00", "<think>", "</think>", "<|im_end|>"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=20,
)
GOOD = json.dumps(
    {"system": "Be kind.", "id": 7, **record("Hello", "Hi", "More", "<think>a</think>b")}
).encode()


def read(content: bytes) -> tuple[list, ReadReport]:
    report = ReadReport()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        return list(read_conversations(path, report)), report


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """`whole` with some bytes replaced, inserted or left out."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(0, 8))
        content[at : at + length] = draw(
            st.binary(max_size=8)
            | st.sampled_from(
                [b'"', b"[", b"{", b"}", b"null", b"1e999", b"\\ud800", b"9" * 5000, b"[" * 3000]
            )
        )
    return bytes(content)


def assert_every_record_is_counted(conversations, report):
    assert len(conversations) + report.skipped_records == report.records
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    for conversation in conversations:
        assert any(message.role == "assistant" for message in conversation.messages)
        assert all(message.content.strip() for message in conversation.messages)
        assert isinstance(conversation.content_hash, int)


@settings(max_examples=300, **COMMON)
@given(st.lists(st.binary(max_size=60) | mutated(GOOD), max_size=4))
def test_any_bytes_are_records_or_our_error(lines):
    try:
        conversations, report = read(b"\n".join(lines))
    except DataError:
        return
    assert_every_record_is_counted(conversations, report)


@settings(max_examples=150, **COMMON)
@given(mutated(gzip.compress(GOOD * 3)))
def test_any_damage_to_gzip_is_our_error(content):
    with contextlib.suppress(DataError):
        assert_every_record_is_counted(*read(content))


@settings(max_examples=250, **COMMON)
@given(VALUES)
def test_any_json_is_a_record_or_a_reason(value):
    try:
        parsed = parse_record(json.dumps(value).encode())
    except UnusableError as error:
        assert str(error)
    else:
        assert parsed.messages


@settings(max_examples=100, **COMMON)
@given(st.text("ab*?[]/,;.~0\x00", max_size=12) | st.just("\x00/?"))
def test_any_file_specification_is_files_or_our_error(text):
    try:
        assert parse_file_spec(text)
    except DataError as error:
        assert str(error)


TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [
            *SPECIAL,
            "<think>",
            "</think>",
            " ",
            "\n",
            "\t",
            "a",
            "é",
            "🙂",
            "\u202e",
            "\x00",
            "\ue000",
            "\ufffd",
            "{{ x }}",
            "{% raw %}",
            "assistant",
            "\r\n",
        ]
    ),
    max_size=12,
).map("".join)
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), TEXTS, TEXTS),
    min_size=1,
    max_size=6,
)


@settings(max_examples=300, **COMMON)
@given(st.sampled_from(ENCODERS), MESSAGES)
def test_any_messages_are_encoded_as_serving_would_or_skipped(encoder, messages):
    try:
        encoded = encoder.encode(messages)
    except TemplateError as error:
        assert str(error)
        return
    assert encoded.tokens.dtype == encoded.turn_ids.dtype == np.int32
    assert encoded.tokens.shape == encoded.turn_ids.shape
    turns = np.unique(encoded.turn_ids[encoded.turn_ids > 0])
    assert turns.tolist() == list(range(1, len(turns) + 1))
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    chat = [
        {"role": m.role, "content": m.content}
        | ({"reasoning_content": m.reasoning} if m.reasoning else {})
        for m in messages[: last + 1]
    ]
    text = encoder.tokenizer.apply_chat_template(chat, tokenize=False)
    ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.tokens.tolist() == ids
    # No turn holds an end token before its end: nothing is trained behind a reply's own end.
    for turn in turns:
        inside = encoded.tokens[encoded.turn_ids == turn][:-1]
        assert not set(inside.tolist()) & encoder.end_ids


TEMPLATE_PARTS = st.sampled_from(
    [
        *("{{ ", " }}", "{% for m in messages %}", "{% endfor %}", "{% if ", " %}", "{% endif %}"),
        *("m.content", "messages", "loop.index", "range(99999)", "'%99999999d'", " % 1", " * 999"),
        *(" | length", " | join", " ** 99", " ~ ", "strftime_now('%Y')", "namespace(x=1)", "//0"),
        *("{% set x = ", "{% generation %}", "{% endgeneration %}", "[0]", ".x", "(", ")", "'"),
    ]
)


@settings(max_examples=400, **COMMON)
@given(st.lists(TEMPLATE_PARTS, max_size=10).map("".join))
def test_any_template_renders_or_is_our_error(template):
    messages = [Message("user", "Hello"), Message("assistant", "Hi")]
    try:
        text, blocks = TemplateRenderer(template, {}).render(messages)
    except TemplateError as error:
        assert str(error)
    else:
        assert all(0 <= start <= end <= len(text) for start, end in blocks)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


def test_any_damage_to_a_tokenizer_is_our_error(tokenizer_folder):
    start = time.monotonic()

    @settings(max_examples=40, **COMMON)
    @given(st.data())
    def damage(data):
        name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
        path = tokenizer_folder / name
        whole = path.read_bytes()
        path.write_bytes(data.draw(mutated(whole)))
        try:
            load_tokenizer(tokenizer_folder)
        except DataError as error:
            assert "trust_remote_code" not in str(error)
        finally:
            path.write_bytes(whole)

    damage()
    assert time.monotonic() - start < 60
