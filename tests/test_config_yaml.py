"""Files and typed text of any kind: plain data is read, anything else is a ConfigError, at once."""

import os
import time

import pytest
from config_helpers import error, init
from hypothesis import example, given, settings
from hypothesis import strategies as st

from MaxDraft import config_layers
from MaxDraft.config_keys import KEYS
from MaxDraft.config_yaml import MAX_BYTES, MAX_PROBLEMS, ConfigError

FUZZ = settings(derandomize=True, deadline=None, max_examples=300, database=None)


def refused(text, folder):
    """The message for a model file with this text, which must come within a second."""
    path = folder / "model.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    begun = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        config_layers.from_file(path)
    assert time.monotonic() - begun < 1
    return str(caught.value)


BOMB = "target_config:\n  a0: &a0 [x, x]\n" + "".join(
    f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


def test_anchors_and_aliases_are_refused(tmp_path):
    assert "model.yml:2: anchors (&) and aliases (*) are not read" in refused(BOMB, tmp_path)
    assert "anchors" in error("target_config={a: &x [1], b: *x}")
    assert "anchors" in refused("target_config: &x\n  a: *x\n", tmp_path)


def test_tags_are_refused(tmp_path):
    assert "model.yml:1: the tag tag:yaml.org,2002:int is not read" in refused(
        "steps: !!int 7\n", tmp_path
    )
    assert "is not read" in refused("run_name: !!python/object/apply:os.getcwd []\n", tmp_path)


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nesting_is_refused(opening, tmp_path):
    assert refused("target_config: {a: " + opening * 50_000, tmp_path)
    assert "nested deeper than 16 levels" in error(f"target_config={'{a: [' * 20}")


def test_a_file_too_large_for_a_configuration_is_refused(tmp_path):
    text = "# " + "x" * MAX_BYTES + "\n"
    assert f"longer than {MAX_BYTES} bytes" in refused(text, tmp_path)


def test_a_file_of_another_kind_is_refused_at_once(tmp_path):
    keys = "".join(f"learning_rate_{i}: 1\n" for i in range(2_000))
    message = refused(keys, tmp_path)
    assert message.count("unknown key") == MAX_PROBLEMS
    assert message.endswith("model.yml:21: and so on")


def test_a_file_that_never_ends_is_refused(tmp_path):
    (tmp_path / "model.yml").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="longer than"):
        config_layers.from_file(tmp_path / "model.yml")


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    assert "is not UTF-8 text" in refused(b"run_name: \xff\n", tmp_path)


@pytest.mark.parametrize("value", ["9" * 5000, "1" * 19, ".nan", "NaN", "-.inf"])
def test_a_number_that_is_none_is_refused(value, tmp_path):
    assert "model.yml:1: steps must be an integer" in refused(f"steps: {value}\n", tmp_path)


@pytest.mark.parametrize("value", ["9" * 5000, ".nan", "NaN", "-.inf", "1e999"])
def test_a_float_that_is_not_finite_is_refused(value, tmp_path):
    text = f"learning_rate: {value}\n"
    assert "model.yml:1: learning_rate must be a finite number" in refused(text, tmp_path)


def test_a_long_value_is_cut_in_the_message():
    assert len(error(f"steps={'x' * 100_000}")) < 300


def test_bytes_that_are_no_utf_8_are_refused_on_the_command_line():
    assert "run_name must be text" in error("run_name=" + os.fsdecode(b"\xff"))


@FUZZ
@given(st.binary(max_size=400))
@example(b'target_config: {a: "\\ud800"}')
@example(b'target_config: {a: "\\UFFFFFFFF"}')
@example(b"%YAML " + b"9" * 5000 + b".1\n---\nsteps: 1\n")
@example(b"? [a]\n: b\n")
@example(b"--- a\n--- b\n")
def test_any_bytes_as_a_file_are_values_or_a_config_error(data):
    _reads(data)


YAML_PIECES = st.lists(
    st.sampled_from(
        [
            *KEYS,
            *(": ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ", "*a ", "!!int ", "| ", "> ", "'"),
            *(
                '"',
                "? ",
                "# ",
                "--- ",
                "... ",
                "  ",
                "\t",
                "<<",
                "~",
                "1e999",
                "\\u0000",
                "%TAG ! x",
            ),
        ]
    ),
    max_size=40,
).map("".join)


@FUZZ
@given(YAML_PIECES)
def test_any_pieces_of_yaml_are_values_or_a_config_error(text):
    _reads(text.encode())


def _reads(data):
    path = config_layers.SCHEMA_PATH.parent / "unused.yml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.open", lambda *_: __import__("io").BytesIO(data))
        try:
            values = config_layers.from_file(path)
        except ConfigError:
            return
    assert set(values) <= set(KEYS)
    assert all(type(value) is KEYS[name].type for name, value in values.items())


ANY_TEXT = st.text(max_size=60) | YAML_PIECES


@FUZZ
@given(st.sampled_from([*KEYS]), ANY_TEXT)
@example("target_path", "\0")
@example("run_name", "~")
@example("base_output_directory", "~nosuchuser")
@example("target_config", "{a: {b: [1, 2]}}")
def test_any_value_of_any_key_is_taken_or_a_config_error(name, text):
    _resolves(f"{name}={text}")


@FUZZ
@given(ANY_TEXT)
@example("=")
@example("--steps")
def test_any_argument_is_taken_or_a_config_error(text):
    _resolves(text)


def _resolves(argument):
    try:
        config = init(argument)
    except ConfigError:
        return
    # What was taken can be written, and its folders be named.
    config.to_yaml().encode()
    assert config.run_directory.is_absolute()
    assert config.export_directory.is_absolute()
