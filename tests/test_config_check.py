"""config.json is compared with the model file by what both mean; every difference is named."""

from types import MappingProxyType

import pytest
from any_json import SETTINGS, mutated, only_user_errors
from hypothesis import given
from hypothesis import strategies as st

from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import read_config
from MaxDraft.convert.target.config_check import check_target_config
from MaxDraft.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_missing_or_broken_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_config(tmp_path)


CONFIG = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
OLD_ROPE = {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
NEW_ROPE = {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}


@pytest.mark.parametrize("expected", [OLD_ROPE, NEW_ROPE, {"rope_theta": 500000}])
@pytest.mark.parametrize("found", [OLD_ROPE, NEW_ROPE])
def test_both_spellings_of_rope_say_the_same(expected, found):
    check_target_config({**CONFIG, **expected}, {**CONFIG, **found}, "a.yml")


def test_what_config_json_leaves_out_has_its_usual_meaning():
    expected = {"head_dim": 128, "tie_word_embeddings": False, "attention_bias": False}
    check_target_config({**CONFIG, **expected}, {**CONFIG, **OLD_ROPE}, "a.yml")
    check_target_config({"num_key_value_heads": 24}, {"num_attention_heads": 24}, "a.yml")
    plain = {"rope_theta": 1e4, "rope_scaling": None}
    check_target_config(plain, {"rope_parameters": {"rope_theta": 1e4}}, "a.yml")
    typed = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}
    named = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    check_target_config(named, typed, "a.yml")


def test_null_in_a_model_file_is_null_in_config_json_only():
    mistral = {"model_type": "mistral", "sliding_window": None}
    check_target_config(mistral, mistral, "a.yml")
    for found in ({"model_type": "mistral"}, mistral | {"sliding_window": 4096}):
        with pytest.raises(CheckpointError, match="sliding_window: the model file has None"):
            check_target_config(mistral, found, "a.yml")


def test_a_model_file_may_list_the_values_of_several_releases():
    expected = {"rope_theta": (1e6, 1e7), "rms_norm_eps": (1e-6, 1e-5)}
    for theta, eps in ((1e6, 1e-6), (1e7, 1e-5)):
        check_target_config(expected, {"rope_theta": theta, "rms_norm_eps": eps}, "a.yml")
    with pytest.raises(CheckpointError, match=r"rope_theta: the model file has .1000000\.0, 1000"):
        check_target_config(expected, {"rope_theta": 5e6, "rms_norm_eps": 1e-6}, "a.yml")
    scaled = {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": (32.0, 64.0)}}
    found = {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", "factor": 64}}
    check_target_config(scaled, found, "a.yml")
    found["rope_scaling"]["factor"] = 16
    with pytest.raises(CheckpointError, match=r"factor: the model file has .*config\.json has 16"):
        check_target_config(scaled, found, "a.yml")


GEMMA_OLD = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
GEMMA_NEW = {
    "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
}


@pytest.mark.parametrize("expected", [GEMMA_OLD, GEMMA_NEW])
@pytest.mark.parametrize(
    "found", [GEMMA_OLD, GEMMA_NEW, {"rope_scaling": GEMMA_OLD["rope_scaling"]}]
)
def test_two_rotary_embeddings_in_any_spelling_say_the_same(expected, found):
    of = {"model_type": "gemma3_text"}
    check_target_config(of | expected, of | found, "a.yml")
    other = {**found, "rope_local_base_freq": 2e4, "rope_parameters": None}
    if "rope_scaling" not in other:
        other |= GEMMA_OLD | {"rope_local_base_freq": 2e4}
    with pytest.raises(CheckpointError, match=r"sliding_attention\.rope_theta.*10000.*20000"):
        check_target_config(of | expected, of | other, "a.yml")


@pytest.mark.parametrize("place", ["top", "parameters"])
def test_a_partial_rotary_factor_is_compared_everywhere(place):
    partial = {"partial_rotary_factor": 0.5}
    found = {"rope_theta": 1e4, **partial}
    found = found if place == "top" else {"rope_parameters": found}
    for expected in (partial, {"rope_theta": 1e4}, {"rope_parameters": {**partial}}):
        check_target_config(expected, found, "a.yml")
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor.* has 0\.25"):
        check_target_config({"partial_rotary_factor": 0.25}, found, "a.yml")


def test_fields_that_transformers_renamed_are_one_field():
    check_target_config({"num_experts": 8}, {"num_local_experts": 8}, "a.yml")
    check_target_config({"hidden_act": "gelu"}, {"hidden_activation": "gelu"}, "a.yml")
    check_target_config({"attention_bias": True}, {"model_type": "glm4"}, "a.yml")


def test_a_frozen_model_file_compares_as_json_does():
    expected = MappingProxyType({"eos_token_id": (1, 2), "rope_scaling": MappingProxyType(LLAMA3)})
    check_target_config(expected, {"eos_token_id": [1, 2], "rope_scaling": LLAMA3}, "a.yml")
    with pytest.raises(CheckpointError, match="eos_token_id"):
        check_target_config(expected, {"eos_token_id": [1], "rope_scaling": LLAMA3}, "a.yml")


def test_every_differing_field_is_in_one_error():
    expected = {**CONFIG, **OLD_ROPE, "head_dim": 128, "tie_word_embeddings": True, "x": 1}
    found = {**CONFIG, "hidden_size": 4096, "rope_theta": 1e4, "rope_scaling": None}
    with pytest.raises(CheckpointError) as error:
        check_target_config(expected, found, "configs/models/a.yml")
    text = str(error.value)
    assert "configs/models/a.yml" in text
    for part in (
        "hidden_size: the model file has 3072, config.json has 4096",
        "head_dim: the model file has 128, config.json has 170",
        "tie_word_embeddings: the model file has True, config.json has False",
        "rope_theta: the model file has 500000.0, config.json has 10000.0",
        "factor: the model file has 32.0, config.json does not have it",
        "rope_type: the model file has 'llama3', config.json has 'default'",
        "x: the model file has 1, config.json does not have it",
    ):
        assert part in text
    assert "rms_norm_eps" not in text


# -------------------------------------------------------------------------------------- any JSON
CONFIGS = [
    CONFIG | OLD_ROPE,
    CONFIG | NEW_ROPE | {"text_config": {"model_type": "llama", "hidden_size": 8}},
    GEMMA_OLD | {"model_type": "gemma3_text", "hidden_size": 8, "num_attention_heads": 2},
    GEMMA_NEW | {"model_type": "gemma3_text", "head_dim": None},
]


@SETTINGS
@given(st.sampled_from(CONFIGS).flatmap(mutated))
def test_any_config_agrees_with_a_model_file_or_is_an_error(config):
    if not isinstance(config, dict):
        return
    for expected in (CONFIG | OLD_ROPE, GEMMA_NEW, {"head_dim": 8}):
        result = only_user_errors(UserError, check_target_config, expected, config, "a.yml")
        assert result is None
