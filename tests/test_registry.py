"""What config.json says, and what it leaves to its family, becomes the same dimensions."""

import json

import numpy as np
import pytest
from goldens import recipe

from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.registry import FAMILIES, dims_from_config, fields_left_out, text_config


def golden_config(name):
    with np.load(recipe.FOLDER / f"{name}.npz") as file:
        return json.loads(str(file["config"]))


def test_every_family_has_a_golden():
    found = {text_config(golden_config(name))["model_type"] for name in recipe.CONFIGS}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("outer", ["llama4", "mistral3"])
def test_the_text_config_of_a_multimodal_config_is_read(outer):
    inner = golden_config("mistral")
    config = {
        "model_type": outer,
        "text_config": inner | {"eos_token_id": None},
        "vision_config": {"hidden_size": 1, "model_type": "vit"},
        "eos_token_id": 7,
        "quantization_config": {"quant_method": "fp8"},
    }
    found = text_config(config)
    assert found["model_type"] == "mistral"
    assert found["hidden_size"] == inner["hidden_size"]
    assert found["eos_token_id"] == 7  # the outer part says what the inner leaves open
    assert found["quantization_config"] == {"quant_method": "fp8"}
    assert "vision_config" not in found
    assert dims_from_config(config) == dims_from_config(inner)


@pytest.mark.parametrize(
    "outer",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"partial_rotary_factor": 0.5},
    ],
)
def test_an_outer_rope_that_contradicts_is_an_error(outer):
    inner = golden_config("mistral")
    with pytest.raises(TargetError, match=f"{next(iter(outer))} is .*text_config"):
        dims_from_config({"model_type": "mistral3", "text_config": inner} | outer)
    same = {"rope_parameters": inner["rope_parameters"]}
    nested = {"model_type": "mistral3", "text_config": inner} | same
    assert dims_from_config(nested) == dims_from_config(inner)


def test_an_empty_text_config_takes_nothing_from_a_flat_file():
    config = golden_config("llama_yarn")
    assert dims_from_config(config | {"text_config": {}}) == dims_from_config(config)


def test_gemma_3s_published_files_leave_out_what_its_family_says():
    fields = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    dims = dims_from_config({"model_type": "gemma3", "text_config": fields})
    assert (dims.vocab_size, dims.tied_head, dims.norm_eps) == (262208, True, 1e-6)
    windows = [layer.mixer.window for layer in dims.layers]
    assert windows[:12] == [1024] * 5 + [0] + [1024] * 5 + [0]
    first, full = dims.layers[0].mixer, dims.layers[5].mixer
    assert (first.num_heads, first.num_kv_heads, first.head_dim) == (8, 4, 256)
    assert first.scale == 256**-0.5
    assert first.rope == Rope(10000.0, 256)
    assert full.rope == Rope(1e6, 256, "linear", factor=8.0)


def test_llama_4s_published_files_leave_out_the_temperature():
    config = golden_config("llama4_scout")
    for name in ("floor_scale", "attn_scale", "layer_types"):
        del config[name]
    mixers = [layer.mixer for layer in dims_from_config(config).layers]
    assert mixers[3].attn_temperature_tuning == (8192.0, 0.1)
    assert mixers[3].rope is None and mixers[3].chunk == 0
    assert mixers[0].attn_temperature_tuning is None and mixers[0].chunk == 100


def test_longrope_is_exact_up_to_the_original_length_only():
    config = golden_config("phi4_mini")
    scaling = config.get("rope_parameters") or config["rope_scaling"]
    original = scaling.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    assert dims_from_config(config).max_length == original < config["max_position_embeddings"]
    short = dims_from_config(config).layers[0].mixer.rope
    assert short.short_factor == tuple(scaling["short_factor"])


def test_a_dynamic_rope_is_the_default_one_up_to_max_length():
    config = golden_config("llama")
    rope = {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    config = {key: value for key, value in config.items() if key != "rope_parameters"}
    plain = dims_from_config(config | {"rope_theta": 10000.0})
    dims = dims_from_config(config | rope)
    assert dims == plain
    assert dims.max_length == config["max_position_embeddings"]
    del rope["rope_scaling"]["factor"]
    with pytest.raises(TargetError, match="'factor'"):
        dims_from_config(config | rope)


@pytest.mark.parametrize("name", ["glm4", "phi4_mini", "qwen3_next", "glm4_moe"])
def test_a_partial_rotary_factor_written_twice_is_read(name):
    config = golden_config(name)
    dims, parameters = dims_from_config(config), config["rope_parameters"]
    factor = parameters["partial_rotary_factor"]
    both = config | {"partial_rotary_factor": factor}
    assert dims_from_config(both) == dims
    outer = {"model_type": "x", "partial_rotary_factor": factor}
    assert dims_from_config(outer | {"text_config": config}) == dims
    assert dims_from_config(outer | {"text_config": both}) == dims
    with pytest.raises(TargetError, match=rf"partial_rotary_factor \({factor} and 0.125\)"):
        dims_from_config(both | {"partial_rotary_factor": 0.125})
    with pytest.raises(TargetError, match=rf"partial_rotary_factor is 0.125, .* {factor}"):
        dims_from_config(outer | {"partial_rotary_factor": 0.125, "text_config": config})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        pytest.param("num_hidden_layers", 10**5000, id="layers of 5,000 digits"),
        ("hidden_size", 1 << 40),
        ("num_attention_heads", 10**9),
        ("head_dim", 1 << 30),
        ("vocab_size", 10**30),
        ("rms_norm_eps", -1),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        pytest.param("rms_norm_eps", 10**5000, id="epsilon of 5,000 digits"),
        ("rms_norm_eps", 1e-300),
        ("max_position_embeddings", [10**5000]),
    ],
)
def test_an_absurd_value_is_an_error_that_names_its_field(field, value):
    with pytest.raises(TargetError, match=f"{field} must be") as error:
        dims_from_config(golden_config("llama") | {field: value})
    assert len(str(error.value)) < 300


def test_a_config_that_is_nested_too_deeply_is_an_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for config in ({"x": deep}, {"text_config": {"rope_scaling": deep}, "rope_scaling": deep}):
        with pytest.raises(TargetError, match="nested more than"):
            dims_from_config(config)
    with pytest.raises(TargetError, match="must be an object of fields"):
        dims_from_config([1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("residual_multiplier", 0.2),
        ("embedding_multiplier", 12.0),
        ("attention_multiplier", 0.015625),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("clip_qkv", 8.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("query_pre_attn_scalar", 256),
    ],
)
def test_a_scale_or_cap_that_is_not_read_is_an_error(name, value):
    config = golden_config("llama")
    with pytest.raises(TargetError, match=f"{name} {value} would change"):
        dims_from_config(config | {name: value})
    assert dims_from_config(config | {name: None}) == dims_from_config(config)


def test_a_scale_of_one_changes_nothing():
    config = golden_config("llama")
    scales = ("residual_multiplier", "embedding_multiplier", "logit_scale", "logits_scaling")
    assert dims_from_config(config | dict.fromkeys(scales, 1.0)) == dims_from_config(config)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi4_mini"])
def test_a_file_of_transformers_has_nothing_left_out(name):
    assert fields_left_out(golden_config(name)) == []


def test_fields_that_a_family_does_not_read_are_named():
    config = golden_config("llama")
    assert fields_left_out(config) == []
    more = {"zork_norm": True, "a_switch": False, "nothing": None, "resid_pdrop": 0.1}
    assert fields_left_out(config | more) == ["a_switch", "zork_norm"]
    assert fields_left_out({"model_type": "mistral3", "text_config": config | more}) == [
        "a_switch",
        "zork_norm",
    ]


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "gemma2", "gemma3_text", "gpt_oss"])
def test_fields_that_decide_a_shape_count_as_read(name):
    shapes = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_local_experts"}
    caps = {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
    rope = {"rope_theta", "rope_parameters", "rope_scaling", "layer_types", "sliding_window"}
    assert not set(fields_left_out(golden_config(name))) & (shapes | caps | rope)
