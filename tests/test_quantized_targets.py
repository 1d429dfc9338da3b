"""A quantized target computes what its dequantized numbers say, kept in memory or not.

FP8 in 128 x 128 blocks (DeepSeek-V3) and MXFP4 (gpt-oss), dequantized here by NumPy alone.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from harness import relative_error
from safetensors.numpy import save_file

from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import (
    load_target,
    open_weights,
    read_config,
    unused_tensors,
)
from MaxDraft.convert.target.quantized_params import keep_quantized
from MaxDraft.drafts.eagle3.dims import default_captured_layers
from MaxDraft.random_target.configs import CONFIGS
from MaxDraft.random_target.files import write_weights
from MaxDraft.random_target.quantize import QUANTIZERS
from MaxDraft.random_target.weights import draw_tensors
from MaxDraft.targets import decoder
from MaxDraft.targets.registry import dims_from_config
from MaxDraft.targets.table import decoder_params

FAMILIES = ("deepseek_v3", "gpt_oss")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
LENGTH = 48


def dequantized(tensors):
    """Every tensor as plain float32 numbers, by the formats' definitions."""
    plain = {}
    for name, tensor in tensors.items():
        if tensor.dtype == ml_dtypes.float8_e4m3fn:
            rows, cols = tensor.shape
            scale = np.repeat(np.repeat(tensors[name + "_scale_inv"], 128, 0), 128, 1)
            plain[name] = tensor.astype(np.float32) * scale[:rows, :cols]
        elif name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            codes = np.stack([tensor & 15, tensor >> 4], -1).reshape(*tensor.shape[:-1], 32)
            numbers = np.where(codes > 7, -1, 1) * FP4[codes & 7]
            power = tensors[base + "_scales"].astype(np.float32) - 127
            numbers = numbers * np.exp2(power)[..., None]
            plain[base] = numbers.reshape(*numbers.shape[:2], -1).swapaxes(1, 2)
        elif not name.endswith(("_scale_inv", "_scales")):
            plain[name] = tensor.astype(np.float32)
    return {name: np.ascontiguousarray(x.astype(np.float32)) for name, x in plain.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """Folders of one target: as drawn, quantized, and with the quantized file's numbers."""
    config = CONFIGS[request.param]
    unquantized = {k: v for k, v in config.items() if k != "quantization_config"}
    folder = tmp_path_factory.mktemp(request.param)
    paths = [folder / name for name in ("drawn", "quantized", "dequantized")]
    for path in paths:
        path.mkdir()
    write_weights(unquantized, paths[0])
    write_weights(config, paths[1])
    (paths[2] / "config.json").write_text(json.dumps(unquantized))
    quantize = QUANTIZERS[config["quantization_config"]["quant_method"]]
    written = dict(part for name, whole in draw_tensors(config) for part in quantize(name, whole))
    save_file(dequantized(written), paths[2] / "model.safetensors", metadata={"format": "pt"})
    return paths


def table_of(folder):
    dims = dims_from_config(read_config(folder))
    return dims, decoder_params(dims, default_captured_layers(dims.num_layers), jnp.float32)


def logits_of(folder, keep=False):
    dims, table = table_of(folder)
    if keep:
        table = keep_quantized(table, open_weights(folder))
    params = load_target(folder, table)
    tokens = jnp.arange(LENGTH)[None] * 7 % dims.vocab_size

    def forward(params):
        positions = jnp.arange(LENGTH)[None]
        _, _, last = decoder.forward(
            params,
            tokens,
            positions,
            positions * 0,
            dims,
            default_captured_layers(dims.num_layers),
            jnp.float32,
            16,
        )
        return decoder.logits(params, dims, last)[0]

    return np.asarray(jax.jit(forward)(params))


def test_loaded_weights_are_the_dequantized_numbers_bit_for_bit(folders):
    _, quantized, plain = folders
    ours, theirs = (load_target(folder, table_of(folder)[1]) for folder in (quantized, plain))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("deepseek_v3", "model.layers.1.self_attn.o_proj.weight_scale_inv"),
        ("gpt_oss", "model.layers.2.mlp.experts.down_proj_scales"),
    ],
)
def test_a_missing_scale_is_an_error_that_names_it(tmp_path, family, lost, keep):
    write_weights(CONFIGS[family], tmp_path)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["other"] = header.pop(lost)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    _, table = table_of(tmp_path)
    if keep:
        table = keep_quantized(table, open_weights(tmp_path))
    assert unused_tensors(tmp_path, table) == ["other: 1 tensor"]
    with pytest.raises(CheckpointError, match=rf"missing[\s\S]*{lost}|{lost} are missing"):
        load_target(tmp_path, table)


def test_a_target_kept_quantized_computes_the_same(folders):
    _, quantized, plain = folders
    assert relative_error(logits_of(quantized, keep=True), logits_of(plain)) < 1e-5


def test_quantized_logits_are_those_of_transformers(folders):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    def theirs(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        tokens = torch.arange(LENGTH)[None] * 7 % model.config.vocab_size
        with torch.no_grad():
            return model.eval()(tokens).logits[0].float().numpy()

    drawn, quantized, plain = folders
    ours, expected = logits_of(quantized), theirs(plain)
    own_error = relative_error(expected, theirs(drawn))
    assert relative_error(ours, expected) < 1e-4 < own_error
    assert relative_error(ours, theirs(drawn)) < own_error + 1e-4
