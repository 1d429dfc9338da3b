"""Typed text is the type of its key, whatever YAML would make of it."""

import pytest
from config_helpers import error, init


@pytest.mark.parametrize(
    "text", ["on", "1:30", "007", "null", "~", "true", "3e-4", "a: b", " x ", '"q"', "0o17", "a#b"]
)
def test_text_stays_what_was_typed(text, monkeypatch):
    assert init(f"run_name={text}").run_name == text
    monkeypatch.setenv("M_RUN_NAME", text)
    assert init().run_name == text


@pytest.mark.parametrize("text", ["on", "1:30", "007", "null", "1_000", "3e-4"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_text_in_a_file_stays_what_was_typed_quoted_or_not(config_copy, text, quote):
    base, models = config_copy
    (models / "tiny.yml").write_text(f"chat_template: {quote}{text}{quote}\n")
    assert f"there is no file '{text}'" in error(base=base)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1", 1.0), (".5", 0.5), ("1E-2", 0.01), ("+2.", 2.0)]
)
def test_a_float_key_takes_every_spelling_of_a_number(text, value):
    learning_rate = init(f"learning_rate={text}").learning_rate
    assert learning_rate == value
    assert type(learning_rate) is float


def test_a_float_in_a_model_file_may_be_written_3e_4(config_copy):
    base, _ = config_copy
    text = "model_name=other target_path= grain_train_files=x"
    message = error(*text.split(), base=base)
    assert "learning_rate" not in message


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1_0", "0x1", "fast", "", "1:30"])
def test_a_float_key_refuses_what_is_no_finite_number(text):
    message = error(f"learning_rate={text}")
    assert "command line" in message
    assert "learning_rate" in message
    assert "3e-4" in message
    assert repr(text) in message


@pytest.mark.parametrize("text", ["1.5", "1_000", "0o17", "017", "1e3", "true", "", " 7", "١"])
def test_an_int_key_takes_plain_decimals_only(text):
    assert "ttt_length must be an integer" in error(f"ttt_length={text}")


def test_an_int_key_takes_signs():
    assert init("steps=+12").steps == 12
    assert init("steps=-1").steps == -1


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("TRUE", True), ("False", False), ("false", False)]
)
def test_a_bool_key_takes_true_and_false_in_any_case(text, value):
    assert init(f"enable_tensorboard={text}").enable_tensorboard is value


@pytest.mark.parametrize(
    ("text", "write"), [("yes", "true"), ("on", "true"), ("1", "true"), ("No", "false")]
)
def test_a_bool_key_refuses_other_words_and_says_what_to_write(text, write):
    message = error(f"abort_on_nan_loss={text}")
    assert "abort_on_nan_loss must be true or false" in message
    assert f"write {write}" in message


def test_lists_and_dicts_are_given_as_flow_text():
    config = init("target_layer_ids=[1, 13, 24]", "target_config={model_type: llama, eps: 1e-5}")
    assert config.target_layer_ids == (1, 13, 24)
    assert config.target_config == {"model_type": "llama", "eps": 1e-5}


@pytest.mark.parametrize(
    "argument",
    [
        "target_layer_ids=[1, two, 3]",
        "target_layer_ids=[1, 2.5, 3]",
        "target_layer_ids=[true, 2, 3]",
        "target_layer_ids=5",
        "target_layer_ids=",
        "mesh_axes=[data, 1]",
        "mesh_axes={data: 1}",
        "logical_axis_rules=[[draft_batch, data]]",
        "logical_axis_rules=[draft_batch]",
        "target_config=[1]",
        "target_config=llama",
    ],
)
def test_a_list_or_dict_of_the_wrong_shape_is_refused(argument):
    key = argument.split("=")[0]
    assert f"command line: {key} must be a" in error(argument)


def test_broken_flow_text_is_refused():
    assert "command line: target_layer_ids:1: not YAML" in error("target_layer_ids=[1, 2")


def test_a_wrong_type_in_a_file_names_file_and_line(config_copy):
    base, models = config_copy
    (models / "tiny.yml").write_text("# a comment\n\nttt_length: seven\nrun_checkpoint: [a]\n")
    message = error(base=base)
    assert (
        f"{models / 'tiny.yml'}:3: ttt_length must be an integer such as 8, not 'seven'" in message
    )
    assert f"{models / 'tiny.yml'}:4: run_checkpoint must be text" in message


def test_a_wrong_type_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("M_STEPS", "many")
    assert "environment M_STEPS: steps must be an integer" in error()
