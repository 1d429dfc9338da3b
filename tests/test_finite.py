"""NaN and infinity in a target are an error that names the tensor, before any training."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from MaxDraft.convert.finite import check_finite, is_finite
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import load_target, open_weights
from MaxDraft.convert.target.quantized_params import keep_quantized
from MaxDraft.layers.params import Param, shardings

DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e8m0fnu,
]
MATRIX = ("target_embed", "target_mlp")
EXPERTS = ("target_experts", "target_expert_embed", "target_expert_mlp")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_a_dtype_is_finite_or_not_as_numpy_has_it(dtype):
    size = np.dtype(dtype).itemsize
    codes = np.arange(1 << min(16, 8 * size), dtype=np.uint64)
    # Of float32 the upper half of the bits, with the lowest bit off and on.
    codes = np.concatenate([codes << 16, codes << 16 | 1]) if size == 4 else codes
    numbers = codes.astype(f"u{size}").view(dtype)
    expected = np.isfinite(numbers.astype(np.float32))
    assert [is_finite(numbers[i : i + 1]) for i in range(len(numbers))] == expected.tolist()
    assert is_finite(numbers[expected]) and is_finite(numbers[:0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_error_names_the_tensor_and_counts_its_numbers(dtype, wrong):
    array = np.ones((30, 40), dtype)
    check_finite("x", array)
    array[7, 3] = array[29, 39] = wrong
    with pytest.raises(CheckpointError, match=r"^x holds NaN or infinity: 2 of 1,200 numbers"):
        check_finite("x", array)
    check_finite("x", array[:7])
    with pytest.raises(CheckpointError, match="2 of 1,200"):
        check_finite("x", array.T)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("spec", [None, "inputs", "outputs"])
def test_a_target_with_a_number_that_is_not_finite_is_refused(tmp_path, stored, transposed, spec):
    name = "model.layers.1.w"
    tensors = {f"model.layers.{i}.w": np.ones((64, 48), stored) for i in range(3)}
    tensors[name][50, 3] = np.nan
    save_file(tensors, tmp_path / SINGLE)
    shape = (48, 64) if transposed else (64, 48)
    param = Param(
        shape,
        MATRIX,
        "model.layers.{layer}.w",
        jnp.bfloat16,
        transposed=transposed,
        layers=range(3),
    )
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    axis = {"inputs": MATRIX[0], "outputs": MATRIX[1]}.get(spec)
    placement = axis and shardings({"w": param}, mesh, [(axis, ["x"])])
    with pytest.raises(CheckpointError, match=rf"{name} in .*{SINGLE} holds NaN or infinity: 1 of"):
        load_target(tmp_path, {"w": param}, placement)


def test_a_number_beyond_the_dtype_in_memory_is_refused(tmp_path):
    save_file({"w": np.full((4, 4), np.finfo(np.float32).max)}, tmp_path / SINGLE)
    assert np.isfinite(load_target(tmp_path, {"w": Param((4, 4), MATRIX, "w")})["w"]).all()
    with pytest.raises(CheckpointError, match="16 of 16 numbers, read as bfloat16"):
        load_target(tmp_path, {"w": Param((4, 4), MATRIX, "w", jnp.bfloat16)})


@pytest.mark.parametrize("keep", [False, True])
def test_nan_among_float8_values_is_refused(tmp_path, keep):
    values = np.ones((256, 128), ml_dtypes.float8_e4m3fn)
    values[200, 5] = np.nan
    tensors = {"model.w": values, "model.w_scale": np.ones((256, 1), np.float32)}
    save_file(tensors, tmp_path / SINGLE)
    declared = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(declared))
    table = {"w": Param((128, 256), MATRIX, "model.w", jnp.bfloat16, transposed=True)}
    table = keep_quantized(table, open_weights(tmp_path)) if keep else table
    with pytest.raises(CheckpointError, match=r"model\.w in .* holds NaN or infinity: 1 of"):
        load_target(tmp_path, table)


@pytest.mark.parametrize("keep", [False, True])
def test_the_exponent_of_nan_among_mxfp4_scales_is_refused(tmp_path, keep):
    scales = np.full((2, 64, 3), 127, np.uint8)
    blocks = np.full((2, 64, 3, 16), 0x77, np.uint8)
    save_file({"model.w_blocks": blocks, "model.w_scales": scales}, tmp_path / SINGLE)
    declared = {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(declared))
    table = {"w": Param((2, 96, 64), EXPERTS, "model.w", jnp.bfloat16)}
    table = keep_quantized(table, open_weights(tmp_path)) if keep else table
    load_target(tmp_path, table)
    scales[1, 40, 2] = 255
    save_file({"model.w_blocks": blocks, "model.w_scales": scales}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"model\.w(_scales)? in .* holds NaN or infinity"):
        load_target(tmp_path, table)
