"""What a checkpoint declares about its quantized weights is read, or refused by name."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from any_json import JSON, SETTINGS, mutated, only_user_errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import (
    load_target,
    open_weights,
    read_quantization,
    target_memory,
)
from MaxDraft.convert.target.quantization_config import quantization_of
from MaxDraft.convert.target.quantized_params import keep_quantized
from MaxDraft.layers.params import Param


# ------------------------------------------------------------------------------------ config.json
def compressed(layout="float-quantized", strategy="channel", **weights):
    weights = {"type": "float", "num_bits": 8, "strategy": strategy, **weights}
    groups = {"group_0": {"weights": weights, "input_activations": {"num_bits": 8}}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


@pytest.mark.parametrize(
    ("declared", "block"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, (64, 32)),
        ({"quant_method": "fp8", "activation_scheme": "static"}, (128, 128)),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, (128, 128)),
        ({"quant_method": "mxfp4"}, (128, 128)),
        (compressed(), (128, 128)),
        (compressed("naive-quantized", "tensor"), (128, 128)),
        (compressed(strategy="block", block_structure=[64, 128]), (64, 128)),
    ],
)
def test_known_quantizations_are_accepted(declared, block):
    assert quantization_of({"quantization_config": declared}).block == block
    assert quantization_of({"text_config": {"quantization_config": declared}}).block == block


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes"},
        {"bits": 8},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "fp8", "scale_fmt": "divide"},
        {"quant_method": {"name": "fp8"}},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        compressed("int-quantized", type="int"),
        compressed("pack-quantized", type="int", num_bits=4),
        compressed("nvfp4-pack-quantized", num_bits=4),
        compressed(strategy="group"),
        compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        compressed() | {"sparsity_config": "dense"},
        compressed() | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
        compressed() | {"config_groups": [1]},
        compressed() | {"config_groups": {"group_0": "x"}},
        compressed() | {"config_groups": {"group_0": {"weights": [8]}}},
        compressed(symmetric=False),
        compressed(dynamic=True),
        compressed(strategy="block", block_structure="128x128"),
        {"quant_method": "fp8", "weight_block_size": ["128", "128"]},
        {"quant_method": "fp8", "weight_block_size": [64.5, 128]},
        {"quant_method": "fp8", "weight_block_size": "128"},
        {"quant_method": ["fp8"]},
        ["fp8"],
    ],
)
def test_other_quantizations_are_refused(declared):
    with pytest.raises(CheckpointError, match="cannot be read"):
        quantization_of({"quantization_config": declared})


@pytest.mark.parametrize(
    ("declared", "mentioned"),
    [
        (compressed(), True),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, True),
        ({"quant_method": "mxfp4"}, False),
    ],
)
def test_that_activations_stay_unquantized_is_said(declared, mentioned):
    text = str(quantization_of({"quantization_config": declared}))
    assert ("quantization of activations is not applied" in text) == mentioned


def test_a_config_without_a_declaration_is_of_no_quantized_model():
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        assert quantization_of(config) is None


@pytest.mark.parametrize(
    ("declared", "field"),
    [
        ({"quant_method": "fp8", "weight_rotation": "hadamard"}, "weight_rotation"),
        ({"quant_method": "mxfp4", "bits": 3}, "bits"),
        (compressed() | {"scale_direction": "divide"}, "scale_direction"),
        (compressed(zero_point=3), "zero_point"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "rotate": True}, "rotate"),
    ],
)
def test_an_unknown_field_of_a_declaration_is_named(declared, field):
    with pytest.raises(CheckpointError, match=rf"unknown field '{field}'.* remove '{field}' there"):
        quantization_of({"quantization_config": declared})


def test_an_unknown_field_that_says_nothing_is_no_matter():
    declared = {"quant_method": "fp8", "weight_rotation": None, "rotated_modules": []}
    assert quantization_of({"quantization_config": declared}).method == "fp8"


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("GPTQ", {"bits": 4, "group_size": 128, "desc_act": False}),
        ("AWQ", {"w_bit": 4, "q_group_size": 128, "zero_point": True}),
        ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("MLX", {"group_size": 64, "bits": 4}),
        ("'awq'", {"quant_method": "awq", "bits": 4}),
        ("'gptq'", {"quant_method": "gptq", "bits": 4}),
        ("'bitsandbytes'", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("NVFP4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ("NVFP4", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}),
        ("nvfp4-pack-quantized", compressed("nvfp4-pack-quantized", num_bits=4)),
    ],
)
def test_formats_that_are_not_read_are_named_with_the_way_out(name, declared):
    with pytest.raises(CheckpointError) as error:
        quantization_of({"quantization_config": declared})
    assert name in str(error.value)
    assert "target_path the unquantized model" in str(error.value)


def test_mlx_declares_under_a_name_of_its_own():
    declared = {"group_size": 64, "bits": 4, "mode": "affine"}
    with pytest.raises(CheckpointError, match=r"quantization in config\.json declares MLX weights"):
        quantization_of({"quantization": declared})


# -------------------------------------------------------------------------------- ModelOpt's files
MODELOPT_CONFIG = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.29.0"},
}
MODELOPT_FILE = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head"],
    },
}


def write_modelopt(folder, config, file):
    """A ModelOpt FP8 model of one matrix -> its numbers and its parameter table."""
    rng = np.random.default_rng(0)
    values = rng.uniform(-448, 448, (256, 128)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.float32(0.013)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: values, name + "_scale": np.array(scale)}
    tensors[name.removesuffix("weight") + "input_scale"] = np.array(scale)
    save_file(tensors, folder / SINGLE)
    for target, content in (("config.json", config), ("hf_quant_config.json", file)):
        if content is not None:
            (folder / target).write_text(json.dumps(content))
    axes = ("target_embed", "target_mlp")
    table = {"w": Param((128, 256), axes, name, jnp.float32, transposed=True)}
    return values.astype(np.float32).T * scale, table


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ({}, MODELOPT_FILE),
        ({"quantization_config": MODELOPT_CONFIG}, None),
        ({"quantization_config": MODELOPT_CONFIG}, MODELOPT_FILE),
        ({"text_config": {"quantization_config": MODELOPT_CONFIG}}, None),
        ({"quantization_config": MODELOPT_FILE}, None),
    ],
)
def test_both_declarations_of_modelopt_fp8_are_the_same_thing(tmp_path, config, file):
    expected, table = write_modelopt(tmp_path, config, file)
    quantization = read_quantization(tmp_path)
    assert str(quantization) == (
        "ModelOpt FP8 weights; its quantization of activations is not applied"
    )
    np.testing.assert_array_equal(load_target(tmp_path, table)["w"], expected)
    kept = keep_quantized(table, open_weights(tmp_path))
    assert target_memory(kept) == 128 * 256 + 4 < target_memory(table)


def test_two_declarations_that_differ_are_refused_by_name(tmp_path):
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_modelopt(tmp_path, {"quantization_config": config}, MODELOPT_FILE)
    with pytest.raises(CheckpointError, match=r"config\.json declares fp8.*hf_quant_config\.json"):
        read_quantization(tmp_path)


def test_a_modelopt_file_for_the_cache_quantizes_no_weight():
    file = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    assert quantization_of({}, {"hf_quant_config.json": file}) is None


@pytest.mark.parametrize(
    "file", [{}, [], {"quantization": 3}, {"quantization": {"quant_algo": "NVFP4"}}, {"a": 1}]
)
def test_a_file_of_modelopt_that_is_not_understood_is_refused(file):
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json declares"):
        quantization_of({}, {"hf_quant_config.json": file})


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_the_files_of_older_quantizers_are_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps({"bits": 4, "group_size": 128, "desc_act": True}))
    with pytest.raises(CheckpointError, match=rf"{name} declares GPTQ weights"):
        read_quantization(tmp_path)


# --------------------------------------------------------------- tensors that nothing declares
LAYER = "model.layers.0.mlp.up_proj."
PACKED = {
    "NVFP4": {
        "weight": np.zeros((16, 8), np.uint8),
        "weight_scale": np.ones((16, 1), ml_dtypes.float8_e4m3fn),
        "weight_scale_2": np.ones((), np.float32),
    },
    "GPTQ or AWQ": {"qweight": np.zeros((2, 16), np.int32), "scales": np.ones(16, np.float16)},
    "MLX": {
        "weight": np.zeros((16, 2), np.uint32),
        "scales": np.ones((16, 1), ml_dtypes.bfloat16),
        "biases": np.ones((16, 1), ml_dtypes.bfloat16),
    },
    "4-bit bitsandbytes": {"weight": np.zeros((128, 1), np.uint8), "weight.absmax": np.ones(4)},
    "8-bit bitsandbytes": {"weight": np.zeros((16, 16), np.int8), "SCB": np.ones(16)},
    "packed compressed-tensors": {"weight_packed": np.zeros((16, 2), np.int32)},
    "HQQ": {"W_q": np.zeros((16, 8), np.uint8)},
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "fp8"}}])
def test_packed_weights_never_pass_as_unquantized(tmp_path, packing, config):
    save_file({LAYER + name: array for name, array in PACKED[packing].items()}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{packing} weights, which cannot be read"):
        open_weights(tmp_path)


def test_quantized_tensors_without_a_declaration_are_named(tmp_path):
    write_modelopt(tmp_path, {}, None)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight F8_E4M3.*declares how it is"):
        open_weights(tmp_path)
    save_file({LAYER + "w_blocks": np.zeros((2, 4, 1, 16), np.uint8)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"w_blocks U8.*declares how it is quantized"):
        open_weights(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(16, 32), (16, 16)])
def test_whole_numbers_where_a_matrix_is_expected_are_named(tmp_path, dtype, shape):
    name = LAYER + "weight"
    save_file({name: np.zeros(shape, dtype)}, tmp_path / SINGLE)
    param = Param((32, 16), ("target_embed", "target_mlp"), name, transposed=True)
    with pytest.raises(CheckpointError, match=rf"{name}: \w+ \[16, \d+\] where \[16, 32\] of BF16"):
        load_target(tmp_path, {"w": param})


def test_a_scale_beside_an_unquantized_weight_is_named(tmp_path):
    name = LAYER + "weight"
    tensors = {name: np.ones((16, 32), np.float32), name + "_scale": np.ones(16, np.float32)}
    save_file(tensors, tmp_path / SINGLE)
    param = Param((32, 16), ("target_embed", "target_mlp"), name, transposed=True)
    with pytest.raises(CheckpointError, match=rf"{name}: is F32 with a scale {name}_scale"):
        load_target(tmp_path, {"w": param})


# -------------------------------------------------------------------------------------- any JSON
DECLARATIONS = [
    {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["a"]},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    compressed(strategy="block", block_structure=[64, 128]) | {"transform_config": {}},
    MODELOPT_CONFIG,
]


@SETTINGS
@given(st.sampled_from(DECLARATIONS).flatmap(mutated), mutated(MODELOPT_FILE) | st.none())
def test_any_declaration_is_a_quantization_or_a_checkpoint_error(declared, file):
    files = {} if file is None else {"hf_quant_config.json": file}
    config = {"quantization_config": declared, "text_config": declared}
    quantization = only_user_errors(CheckpointError, quantization_of, config, files)
    if quantization is not None:
        assert all(type(size) is int and size > 0 for size in quantization.block)
        assert "weights" in str(quantization)


@SETTINGS
@given(st.dictionaries(st.sampled_from(["quantization_config", "text_config"]), JSON))
def test_any_config_is_a_quantization_or_a_checkpoint_error(config):
    assert only_user_errors(CheckpointError, quantization_of, config) is None
