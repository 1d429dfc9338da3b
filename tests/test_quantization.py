"""Quantized checkpoints: what their numbers mean, on loading and kept in memory.

Expected numbers come from a plain loop over blocks in NumPy, and from transformers.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from MaxDraft.convert.loading import load_parameters
from MaxDraft.convert.safetensors_files import INDEX, SINGLE, open_safetensors
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import load_target, target_memory, unused_tensors
from MaxDraft.convert.target.quantization import pair
from MaxDraft.convert.target.quantization_config import quantization_of
from MaxDraft.convert.target.quantized_params import dequantized, keep_quantized
from MaxDraft.layers import quantized
from MaxDraft.layers.mlp import linear
from MaxDraft.layers.params import Param, Part, Quantized, abstract, count, flatten, shardings

FP8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
MATRIX = ("target_embed", "target_mlp")
EXPERTS = ("target_experts", "target_expert_embed", "target_expert_mlp")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------ references
def fp8_values(*shape):
    return RNG.uniform(-448, 448, shape).astype(FP8)


def scales(*shape):
    return RNG.uniform(0.5, 2.0, shape).astype(np.float32) / 100


def blockwise(values, scale, block):
    """[..., o, i] float32: every block of values times its scale, block by block."""
    out = values.astype(np.float32)
    for row in range(scale.shape[-2]):
        for col in range(scale.shape[-1]):
            rows = slice(row * block[0], (row + 1) * block[0])
            cols = slice(col * block[1], (col + 1) * block[1])
            out[..., rows, cols] *= scale[..., row, col][..., None, None]
    return out


def mxfp4(*shape):
    """Blocks [..., in / 32, 16] and scales of a tensor with outputs [..., out] before them."""
    blocks = RNG.integers(0, 256, (*shape, 16), np.uint8)
    return blocks, RNG.integers(100, 140, shape, np.uint8)


def mxfp4_numbers(blocks, power):
    """[..., in, out] float32, number by number."""
    flat = []
    for group, exponent in zip(blocks.reshape(-1, 16), power.reshape(-1), strict=True):
        for byte in group:
            flat += [
                E2M1[nibble] * 2.0 ** (int(exponent) - 127) for nibble in (byte & 15, byte >> 4)
            ]
    *lead, groups = power.shape
    return np.array(flat, np.float32).reshape(*lead, groups * 32).swapaxes(-1, -2)


def opened(folder, tensors, block=(128, 128)):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / SINGLE)
    return pair(open_safetensors(folder), block)


def load(folder, tensors, table, block=(128, 128), placement=None):
    return load_parameters(folder, opened(folder, tensors, block), table, placement)


def assert_same_bits(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    found, expected = (np.ascontiguousarray(x).view(np.uint8) for x in (found, expected))
    np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------ FP8
SHAPES = {  # of the scale of a [out, in] weight, blocks of 16 outputs and 8 inputs
    "block": lambda o, i: (-(-o // 16), -(-i // 8)),
    "output": lambda o, i: (o, 1),
    "output, flat": lambda o, i: (o,),
    "tensor": lambda o, i: (),
    "tensor, flat": lambda o, i: (1,),
}


def scale_grid(scale, o, i, kind):
    """The scale as [rows, cols], and what a block is."""
    if kind == "block":
        return scale, (16, 8)
    if kind.startswith("output"):
        return scale.reshape(o, 1), (1, i)
    return scale.reshape(1, 1), (o, i)


@pytest.mark.parametrize("size", [(48, 24), (50, 21)])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_float8_matrix_is_its_values_times_its_scales(tmp_path, size, kind, dtype):
    o, i = size
    values, scale = fp8_values(o, i), scales(*SHAPES[kind](o, i))
    expected = blockwise(values, *scale_grid(scale, o, i, kind)).astype(dtype).T
    end = "_scale_inv" if kind == "block" else "_scale"
    param = Param((i, o), MATRIX, "w", dtype, transposed=True)
    loaded = load(tmp_path, {"w": values, "w" + end: scale}, param, (16, 8))
    assert_same_bits(loaded, expected)


@pytest.mark.parametrize("kind", ["block", "output", "tensor"])
@pytest.mark.parametrize("part", [Part(0, 96), Part(48, 96), Part(40, 96), Part(1, 96, 2)])
@pytest.mark.parametrize("keep", [False, True])
def test_a_part_of_a_float8_matrix_has_its_own_scales(tmp_path, kind, part, keep):
    o, i = 96, 24
    values, scale = fp8_values(o, i), scales(*SHAPES[kind](o, i))
    whole = blockwise(values, *scale_grid(scale, o, i, kind)).T
    expected = whole[:, part.start : part.start + 48 * part.step : part.step]
    param = Param((i, 48), MATRIX, "w", np.float32, transposed=True, part=part)
    tensors = opened(tmp_path, {"w": values, "w_scale_inv": scale}, (16, 8))
    table = keep_quantized(param, tensors) if keep else param
    loaded = load_parameters(tmp_path, tensors, table, None)
    if keep:
        assert loaded.values.nbytes == expected.size
        loaded = quantized.dequantize(loaded, jnp.float32)
    assert_same_bits(loaded, expected)


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("keep", [False, True])
def test_float8_experts_in_blocks(tmp_path, per_expert, keep):
    E, o, i = 4, 40, 24
    values, scale = fp8_values(2, E, o, i), scales(2, E, 3, 3)
    expected = blockwise(values, scale, (16, 8)).swapaxes(-1, -2)
    tensors = {}
    for layer in range(2):
        if per_expert:
            for e in range(E):
                tensors[f"{layer}.{e}.w"] = values[layer, e]
                tensors[f"{layer}.{e}.w_scale_inv"] = scale[layer, e]
        else:
            tensors[f"{layer}.w"] = values[layer]
            tensors[f"{layer}.w_scale_inv"] = scale[layer]
    name = "{layer}.{expert}.w" if per_expert else "{layer}.w"
    table = Param((E, i, o), EXPERTS, name, np.float32, transposed=True, layers=(0, 1))
    tensors = opened(tmp_path, tensors, (16, 8))
    table = keep_quantized(table, tensors) if keep else table
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("x", "y", "z"))
    rules = [(EXPERTS[0], ["x"]), (EXPERTS[1], ["y"]), (EXPERTS[2], ["z"])]
    loaded = load_parameters(tmp_path, tensors, table, shardings(table, mesh, rules))
    if keep:
        assert loaded.scale.sharding.spec[:2] == (None, "x")
        loaded = quantized.dequantize(loaded, jnp.float32)
    assert_same_bits(loaded, expected)


@pytest.mark.parametrize("shape", [(4, 1, 20), (4, 20, 1), (4, 20), (4, 1, 1), (4,), ()])
def test_stacked_float8_experts_as_llama_4_has_them(tmp_path, shape):
    values, scale = fp8_values(4, 12, 20), scales(*shape)  # [experts, in, out]
    factor = scale
    if scale.size == 80:
        factor = scale.reshape(4, 1, 20)
    elif scale.size == 4:
        factor = scale.reshape(4, 1, 1)
    expected = values.astype(np.float32) * factor
    for part in (None, Part(10, 20)):
        out = 20 if part is None else 10
        table = Param((4, 12, out), EXPERTS, "experts.down_proj", np.float32, part=part)
        tensors = {"experts.down_proj": values, "experts.down_proj_scale": scale}
        assert_same_bits(load(tmp_path, tensors, table), expected[..., 20 - out :])
        tensors = opened(tmp_path, tensors)
        kept = load_parameters(tmp_path, tensors, keep_quantized(table, tensors), None)
        assert_same_bits(quantized.dequantize(kept, jnp.float32), expected[..., 20 - out :])


def test_float8_numbers_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    values, scale = fp8_values(256, 384), scales(2, 3)
    reference = fp8.Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn),
        torch.from_numpy(scale),
        output_dtype=torch.bfloat16,
    )
    tensors = {"x.weight": values, "x.weight_scale_inv": scale}
    param = Param((384, 256), MATRIX, "x.weight", BF16, transposed=True)
    assert_same_bits(
        load(tmp_path, tensors, param), reference.view(torch.uint8).numpy().view(BF16).T
    )


def test_a_missing_scale_is_an_error_that_names_both(tmp_path):
    param = Param((24, 40), MATRIX, "x.weight", transposed=True)
    for other in ({}, {"y.weight_scale_inv": scales(1, 1)}):
        with pytest.raises(CheckpointError) as error:
            load(tmp_path, {"x.weight": fp8_values(40, 24), **other}, param)
        for name in ("x.weight:", "F8_E4M3", "x.weight_scale_inv", "x.weight_scale"):
            assert name in str(error.value)


def test_a_scale_may_lie_in_another_file_than_its_weight(tmp_path):
    values, scale = fp8_values(40, 24), scales(40, 1)
    parts = {"a.safetensors": {"w": values}, "b.safetensors": {"w_scale": scale}}
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    loaded = load_target(tmp_path, Param((24, 40), MATRIX, "w", np.float32, transposed=True))
    assert_same_bits(loaded, (values.astype(np.float32) * scale).T)


@pytest.mark.parametrize("shape", [(3, 2), (24,), (3, 3, 1), (2,), (24, 1)])
def test_a_scale_of_another_shape_is_an_error(tmp_path, shape):
    param = Param((24, 40), MATRIX, "w", transposed=True)
    with pytest.raises(CheckpointError, match=r"w_scale: shape .* fits no scale of w \[40, 24\]"):
        load(tmp_path, {"w": fp8_values(40, 24), "w_scale": scales(*shape)}, param, (16, 8))


@pytest.mark.parametrize("keep", [False, True])
def test_config_json_decides_where_a_scale_fits_twice(tmp_path, keep):
    """[2, 256] in blocks of 128: two scales, of halves of the inputs, that are as many as rows."""
    values, scale = fp8_values(2, 256), scales(1, 2)
    whole = {"w": values, "w_scale_inv": scale}
    param = Param((256, 2), MATRIX, "w", np.float32, transposed=True)
    save_file(whole, tmp_path / SINGLE)
    declared = quantization_of(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    )
    for in_blocks, expected in (
        (declared.in_blocks, blockwise(values, scale, (128, 128))),
        (False, values.astype(np.float32) * scale.reshape(2, 1)),
    ):
        tensors = pair(open_safetensors(tmp_path), declared.block, in_blocks)
        table = keep_quantized(param, tensors) if keep else param
        loaded = load_parameters(tmp_path, tensors, table, None)
        loaded = quantized.dequantize(loaded, jnp.float32) if keep else loaded
        assert_same_bits(loaded, expected.T)


def test_the_blocks_of_config_json_reach_the_targets_tensors(tmp_path):
    values, scale = fp8_values(2, 256), scales(1, 2)
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / SINGLE)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    param = Param((256, 2), MATRIX, "w", np.float32, transposed=True)
    assert_same_bits(load_target(tmp_path, param), blockwise(values, scale, (128, 128)).T)


def test_two_scales_of_one_tensor_are_an_error_that_names_them(tmp_path):
    param = Param((24, 40), MATRIX, "w", transposed=True)
    whole = {"w": fp8_values(40, 24), "w_scale": scales(1), "w_scale_inv": scales(1)}
    with pytest.raises(CheckpointError, match="w: has two scales, w_scale_inv and w_scale"):
        load(tmp_path, whole, param)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("keep", [False, True])
def test_a_scale_that_is_no_number_is_an_error_that_names_it(tmp_path, wrong, keep):
    scale = scales(40, 1)
    scale[3] = wrong
    tensors = opened(tmp_path, {"w": fp8_values(40, 24), "w_scale": scale})
    param = Param((24, 40), MATRIX, "w", np.float32, transposed=True)
    table = keep_quantized(param, tensors) if keep else param
    with pytest.raises(CheckpointError, match="w_scale: has scales that are no finite numbers"):
        load_parameters(tmp_path, tensors, table, None)


# ---------------------------------------------------------------------------------------- MXFP4
@pytest.mark.parametrize("part", [None, Part(0, 40, 2), Part(1, 40, 2), Part(20, 40)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_mxfp4_blocks_are_the_tensor_they_stand_for(tmp_path, part, keep, dtype):
    blocks, power = mxfp4(3, 40, 4)
    expected = mxfp4_numbers(blocks, power).astype(dtype)  # [3, 128, 40]
    if part:
        expected = expected[..., part.start : part.start + 20 * part.step : part.step]
    table = Param((3, 128, expected.shape[-1]), EXPERTS, "gate_up_proj", dtype, part=part)
    tensors = opened(tmp_path, {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": power})
    table = keep_quantized(table, tensors) if keep else table
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("y", "z"))
    placement = shardings(table, mesh, [(EXPERTS[1], ["y"]), (EXPERTS[2], ["z"])])
    loaded = load_parameters(tmp_path, tensors, table, placement)
    if keep:
        assert (
            loaded.values.nbytes + loaded.scale.nbytes == expected.size // 2 + expected.size // 32
        )
        loaded = quantized.dequantize(loaded, dtype)
    assert_same_bits(loaded, expected)


def test_mxfp4_numbers_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, power = mxfp4(2, 24, 3)
    tensors = {"x_blocks": blocks, "x_scales": power}
    expected = reference(torch.from_numpy(blocks.copy()), torch.from_numpy(power.copy()))
    table = Param((2, 96, 24), EXPERTS, "x", BF16)
    assert_same_bits(load(tmp_path, tensors, table), expected.view(torch.uint8).numpy().view(BF16))


def test_mxfp4_scales_must_be_there_and_fit(tmp_path):
    blocks, power = mxfp4(2, 24, 3)
    table = Param((2, 96, 24), EXPERTS, "x")
    with pytest.raises(CheckpointError, match="x_blocks: its scales x_scales are missing"):
        load(tmp_path, {"x_blocks": blocks}, table)
    with pytest.raises(
        CheckpointError, match=r"x_scales: expected U8 \[2, 24, 3\] beside x_blocks"
    ):
        load(tmp_path, {"x_blocks": blocks, "x_scales": power[:, :8]}, table)


# --------------------------------------------------------------------------------- kept in memory
def test_vectors_and_vocabularies_are_dequantized(tmp_path):
    whole = {"w": fp8_values(256, 128), "w_scale": scales(256, 1)}
    tensors = opened(tmp_path, whole)
    for axes in [("target_vocab", "target_embed"), ("target_embed", "target_vocab"), (None, None)]:
        param = Param((128, 256), axes, "w", BF16, transposed=True)
        assert keep_quantized(param, tensors) is param
        assert dequantized({"a": param}, tensors) == ["a"]
    param = Param((128, 256), MATRIX, "w", BF16, transposed=True)
    kept = keep_quantized({"a": param}, tensors)
    assert isinstance(kept["a"], Quantized)
    assert dequantized(kept, tensors) == []
    assert [name for name, _ in flatten(kept)] == ["a/values", "a/scale"]


def test_layers_that_are_quantized_differently_are_dequantized(tmp_path):
    tensors = {"0": fp8_values(128, 128), "0_scale": scales(128, 1), "1": scales(128, 128)}
    param = Param((128, 128), MATRIX, "{layer}", np.float32, transposed=True, layers=(0, 1))
    paired = opened(tmp_path, tensors)
    assert keep_quantized(param, paired) is param
    assert dequantized({"a": param}, paired) == ["a"]
    loaded = load_parameters(tmp_path, paired, param, None)
    first = tensors["0"].astype(np.float32) * tensors["0_scale"]
    assert_same_bits(loaded, np.stack([first.T, tensors["1"].T]))


def test_the_memory_of_both_forms_is_counted(tmp_path):
    tensors = opened(tmp_path, {"w": fp8_values(512, 256), "w_scale_inv": scales(4, 2)})
    table = {"w": Param((256, 512), MATRIX, "w", BF16, transposed=True)}
    kept = keep_quantized(table, tensors)
    assert target_memory(table) == 2 * 256 * 512
    assert target_memory(kept) == 256 * 512 + 4 * 8
    assert count(kept) == 256 * 512 + 8
    assert [leaf.shape for leaf in jax.tree.leaves(abstract(kept))] == [(256, 512), (2, 4)]


def test_a_target_loads_quantized_and_no_scale_is_unused(tmp_path):
    tensors = {"model.w": fp8_values(256, 128), "model.w_scale": scales(256, 1)}
    table = {"w": Param((128, 256), MATRIX, "model.w", BF16, transposed=True)}
    kept = keep_quantized(table, opened(tmp_path, tensors))
    declared = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(declared))
    for some in (table, kept):
        assert unused_tensors(tmp_path, some) == []
    expected = load_target(tmp_path, table)["w"]
    assert_same_bits(quantized.dequantize(load_target(tmp_path, kept)["w"], BF16), expected)


@pytest.mark.parametrize(
    ("axes", "tiled"),
    [
        (("target_embed", "target_mlp"), "in"),
        (("target_mlp", "target_embed"), "out"),
        ((None, "target_heads"), "in"),
        (("target_embed", None), "out"),
    ],
)
def test_tiles_lie_along_what_tensor_parallelism_leaves_whole(tmp_path, axes, tiled):
    tensors = opened(tmp_path, {"w": fp8_values(256, 128), "w_scale": scales(256, 1)})
    assert keep_quantized(Param((128, 256), axes, "w", transposed=True), tensors).tiled == tiled


# ------------------------------------------------------------------------------------ the product
def some(kind, tiled, rows, cols, lead=()):
    """A Quantized [*lead, rows, cols] of random numbers."""
    if kind == "mxfp4":
        blocks, power = mxfp4(*lead, cols, rows // 32)
        values = blocks.reshape(*lead, cols, -1).swapaxes(-1, -2)
        return Quantized(*map(jnp.asarray, (values, power.swapaxes(-1, -2))), rows, kind, tiled)
    a, b = {"block": (rows // 128, cols // 128), "output": (1, cols), "tensor": (1, 1)}[kind]
    values, scale = fp8_values(*lead, rows, cols), scales(*lead, a, b)
    return Quantized(jnp.asarray(values.view(np.uint8)), jnp.asarray(scale), rows, "fp8", tiled)


@pytest.mark.parametrize("kind", ["block", "output", "tensor", "mxfp4"])
@pytest.mark.parametrize("tiled", ["in", "out"])
@pytest.mark.parametrize("tile", [1 << 22, 1 << 15])
def test_the_product_tile_by_tile_is_the_product(monkeypatch, kind, tiled, tile):
    monkeypatch.setattr(quantized, "_TILE", tile)
    q = some(kind, tiled, 512, 384)
    assert quantized.tile_count(q) == (1 if tile > 1 << 20 else 4 if tiled == "in" else 3)
    x = jnp.asarray(RNG.standard_normal((3, 5, 512), np.float32))
    bias = jnp.arange(384.0)
    expected = np.asarray(x) @ np.asarray(quantized.dequantize(q, jnp.float32)) + np.arange(384.0)
    found = np.asarray(jax.jit(linear)(x, q, bias))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["block", "output", "mxfp4"])
@pytest.mark.parametrize("tiled", ["in", "out"])
def test_experts_multiply_tile_by_tile(monkeypatch, kind, tiled):
    monkeypatch.setattr(quantized, "_TILE", 1 << 15)
    q = some(kind, tiled, 256, 384, lead=(4,))
    x = jnp.asarray(RNG.standard_normal((12, 256), np.float32))
    sizes = jnp.array([3, 0, 5, 4])
    found = quantized.multiply(x, q, lambda x, w: jax.lax.ragged_dot(x, w, sizes))
    whole = quantized.dequantize(q, jnp.float32)
    np.testing.assert_allclose(
        found, jax.lax.ragged_dot(x, whole, sizes), rtol=1e-5, atol=1e-5 * np.abs(found).max()
    )
    one = jax.tree.map(lambda leaf: leaf[2], q)
    assert_same_bits(quantized.dequantize(one, jnp.float32), whole[2])


@pytest.mark.parametrize("kind", ["block", "mxfp4"])
@pytest.mark.parametrize("tiled", ["in", "out"])
def test_a_split_matrix_multiplies_alike(monkeypatch, kind, tiled):
    monkeypatch.setattr(quantized, "_TILE", 1 << 15)
    q = some(kind, tiled, 512, 512)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    split = ("fsdp", "tensor") if tiled == "in" else ("tensor", "fsdp")
    scale = (None, split[1]) if kind == "mxfp4" else ()
    placed = jax.device_put(
        q,
        Quantized(
            NamedSharding(mesh, PartitionSpec(*split)),
            NamedSharding(mesh, PartitionSpec(*scale)),
            q.in_size,
            q.kind,
            q.tiled,
        ),
    )
    x = jnp.asarray(RNG.standard_normal((8, 512), np.float32))
    expected = np.asarray(linear(x, q))
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    found = jax.jit(linear)(x, placed)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["block", "output", "mxfp4"])
@pytest.mark.parametrize("tiled", ["in", "out"])
def test_the_dequantized_matrix_never_exists_as_a_whole(monkeypatch, kind, tiled):
    monkeypatch.setattr(quantized, "_TILE", 1 << 18)
    q = some(kind, tiled, 2048, 2048)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((4, 2048), dtype)
        compiled = jax.jit(linear).lower(x, q).compile()
        whole = 2048 * 2048 * jnp.dtype(dtype).itemsize
        assert compiled.memory_analysis().temp_size_in_bytes < whole
