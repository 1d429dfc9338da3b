"""The JSON reader takes what the standard allows; everything else is one class of error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from MaxDraft.strict_json import MAX_DEPTH, JsonError, parse_json

SETTINGS = settings(derandomize=True, deadline=None, max_examples=200)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    # Half a surrogate pair is no text, and an infinite number no JSON.
    .filter(lambda x: abs(x) != float("inf"))
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=20,
)


@SETTINGS
@given(VALUES)
def test_what_python_writes_reads_back_the_same(value):
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text.encode("utf-8", "surrogatepass")) == value


@SETTINGS
@given(st.binary(max_size=200) | st.text('[]{}:,"\\ud8019eE+-.NaIinfty \n').map(str.encode))
def test_any_bytes_are_json_or_a_json_error(raw):
    try:
        value = parse_json(raw)
    except JsonError:
        return
    assert json.loads(raw) == value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff", "not UTF-8: invalid start byte at byte 0"),
        (b'{"a": 1, "b": 2, "a": 1}', "the name 'a' stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "1e999 is larger than a float64"),
        (b"[" + b"7" * 5000 + b"]", "an integer of 5,000 digits, 77777777..."),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 500 + b"]" * 500, f"nested more than {MAX_DEPTH} deep"),
        (rb'{"\ud800": 1}', "half of a surrogate pair"),
        (rb'["\uDFFF"]', "half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_the_text_is_said(raw, message):
    with pytest.raises(JsonError) as error:
        parse_json(raw)
    assert message in str(error.value)


def test_a_text_longer_than_its_bound_is_not_read():
    assert parse_json(b"[1, 2]", max_bytes=6) == [1, 2]
    with pytest.raises(JsonError, match="more than the 5 bytes"):
        parse_json(b"[1, 2]", max_bytes=5)


def test_numbers_that_models_really_have_are_read():
    raw = rb'{"model_max_length": 1000000000000000019884624838656, "name": "\ud83d\ude00"}'
    assert parse_json(raw) == {
        "model_max_length": int(1e30),
        "name": "\N{GRINNING FACE}",
    }
    assert parse_json(b'{"time_step_limit": [0.0, Infinity]}', nan=True) == {
        "time_step_limit": [0.0, float("inf")]
    }
