"""convert/: reading safetensors, config.json checks, and the target on its devices.

Files are written by the safetensors library or by hand, never by the code under test.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import models
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from MaxDraft import pyconfig, sharding
from MaxDraft.convert import loading
from MaxDraft.convert.read_tensor import Source
from MaxDraft.convert.safetensors_files import INDEX, SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import (
    load_target,
    target_fingerprint,
    unused_tensors,
)
from MaxDraft.layers.params import flatten, shardings
from MaxDraft.targets.table import decoder_params

BASE_YML = Path(__file__).parent.parent / "configs" / "base.yml"
DIMS = models.tiny_dims(vocab_size=32)


def table(dtype=jnp.float32, dims=DIMS):
    return decoder_params(dims, models.CAPTURE, dtype)


def random_tensors(dtype=np.float32, seed=0):
    """Every tensor of the tiny target as a checkpoint has it, [out, in]."""
    rng = np.random.default_rng(seed)
    H, I, V, q, kv = 32, 48, 32, 32, 16
    shapes = {
        "model.embed_tokens.weight": (V, H),
        "model.norm.weight": (H,),
        "lm_head.weight": (V, H),
    }
    for layer in range(6):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (H,),
            prefix + "self_attn.q_proj.weight": (q, H),
            prefix + "self_attn.k_proj.weight": (kv, H),
            prefix + "self_attn.v_proj.weight": (kv, H),
            prefix + "self_attn.o_proj.weight": (H, q),
            prefix + "post_attention_layernorm.weight": (H,),
            prefix + "mlp.gate_proj.weight": (I, H),
            prefix + "mlp.up_proj.weight": (I, H),
            prefix + "mlp.down_proj.weight": (H, I),
        }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def save_shards(folder, tensors, shards=3):
    """Splits the tensors over files and writes their index."""
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content))
    return content


def expected_leaf(tensors, param):
    names = [param.tensor]
    if param.layers is not None:
        names = [param.tensor.format(layer=layer) for layer in param.layers]
    arrays = [tensors[name].T if param.transposed else tensors[name] for name in names]
    return arrays[0] if param.layers is None else np.stack(arrays)


def assert_is(tree, params, tensors):
    for (name, param), leaf in zip(flatten(params), jax.tree.leaves(tree), strict=True):
        expected = expected_leaf(tensors, param).astype(param.dtype)
        assert leaf.dtype == param.dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=name)


# --------------------------------------------------------------------------------- fingerprint
def test_the_fingerprint_tells_targets_apart_but_not_their_files(tmp_path):
    folders = [tmp_path / name for name in ("single", "shards", "tuned", "config")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"b": 1, "a": 2}))
    tensors = random_tensors()
    save_file(tensors, folders[0] / SINGLE)
    save_shards(folders[1], tensors)
    (folders[1] / "config.json").write_text(json.dumps({"a": 2, "b": 1}, indent=1))
    name = "model.layers.3.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] + 1}, folders[2] / SINGLE)
    save_file(tensors, folders[3] / SINGLE)
    (folders[3] / "config.json").write_text(json.dumps({"b": 1, "a": 3}))
    single, shards, tuned, config = map(target_fingerprint, folders)
    assert single == shards
    assert len({single, tuned, config}) == 3


# ------------------------------------------------------------------------------------- loading
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_target_loads_on_one_device(tmp_path, stored, dtype):
    tensors = random_tensors(stored)
    save_file(tensors, tmp_path / SINGLE)
    loaded = load_target(tmp_path, table(dtype))
    assert_is(loaded, table(dtype), tensors)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 1, 4), (2, 1, 2, 2), (8, 1, 1, 1)])
def test_a_target_loads_under_the_rules_of_base_yml(tmp_path, shape):
    rules = pyconfig.initialize(["test", str(BASE_YML)]).logical_axis_rules
    tensors = random_tensors(ml_dtypes.bfloat16)
    save_shards(tmp_path, tensors)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    params = table(jnp.bfloat16)
    placement = shardings(params, Mesh(devices, ("data", "fsdp", "expert", "tensor")), rules)
    loaded = load_target(tmp_path, params, placement)
    assert_is(loaded, params, tensors)
    for leaf, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(placement), strict=True):
        assert leaf.sharding == place


def test_replicas_are_read_once_and_shards_only_their_part(tmp_path, monkeypatch):
    save_file(random_tensors(), tmp_path / SINGLE)
    read, shapes = [], []
    copy_to = Source.copy_to

    def counting(self, out, ranges):
        read.append((self.tensor.name, out.size))
        shapes.append((self.tensor.name, out.shape))
        copy_to(self, out, ranges)

    monkeypatch.setattr(Source, "copy_to", counting)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))
    params = table()
    rules = [("target_embed", ["fsdp"])]
    load_target(tmp_path, params, shardings(params, mesh, rules))
    sizes = {}
    for name, size in read:
        sizes.setdefault(name, []).append(size)
    assert sizes["model.layers.0.mlp.up_proj.weight"] == [32 * 48 // 4] * 4
    assert sizes["model.norm.weight"] == [32]
    # Whole rows of the file, [48, 32], though the parameter is split along what are its columns.
    assert {shape for name, shape in shapes if name.endswith("0.mlp.up_proj.weight")} == {(32, 12)}


def test_all_missing_and_misshaped_tensors_are_in_one_error(tmp_path):
    tensors = random_tensors()
    del tensors["model.layers.5.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((32, 16), np.float32)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.ones((16, 32), np.int32)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError) as error:
        load_target(tmp_path, table())
    text = str(error.value)
    assert "model.layers.5.mlp.up_proj.weight: missing, expected [48, 32]" in text
    assert "model.norm.weight: expected [32], found [31]" in text
    assert "model.layers.0.self_attn.k_proj.weight: expected [16, 32], found [32, 16]" in text
    assert "model.layers.1.self_attn.k_proj.weight: I32 [16, 32] where [16, 32] of" in text


def test_integers_are_no_weights(tmp_path):
    tensors = random_tensors()
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=rf"{name}: I8 .*not quantized"):
        load_target(tmp_path, table())


def test_a_tied_head_may_or_may_not_have_its_second_copy(tmp_path):
    params = table()
    del params["head"]
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / SINGLE)
    assert_is(load_target(tmp_path, params), params, tensors)
    assert unused_tensors(tmp_path, params) == []
    tensors["lm_head.weight"][16] += 1
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="ties the LM head"):
        load_target(tmp_path, params)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / SINGLE)
    assert_is(load_target(tmp_path, params), params, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        load_target(tmp_path, table())


def test_tensors_that_nothing_reads_are_listed_in_groups(tmp_path):
    one = np.ones(1, np.float32)
    extra = {
        "model.layers.6.mlp.up_proj.weight": one,
        "model.layers.6.enorm.weight": one,
        "model.layers.0.self_attn.q_proj.bias": one,
        "model.layers.1.self_attn.q_proj.bias": one,
        "model.layers.0.self_attn.rotary_emb.inv_freq": one,
        "model.layers.0.self_attn.q_proj.input_scale": one,
        "model.layers.0.self_attn.k_proj.input_scale": one,
        "model.vision_tower.blocks.0.weight": one,
        "mtp.layers.0.weight": one,
        "mtp.norm.weight": one,
    }
    save_file({**random_tensors(), **extra}, tmp_path / SINGLE)
    assert unused_tensors(tmp_path, table()) == [
        "*.input_scale (of activations, which are not quantized here): 2 tensors",
        "model.layers.*.self_attn.q_proj.bias: 2 tensors",
        "model.layers.6.* (layer beyond the target's 6, multi-token prediction): 2 tensors",
        "model.vision_tower.*: 1 tensor",
        "mtp.*: 2 tensors",
    ]


@pytest.mark.parametrize(
    ("body", "head"),
    [
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("language_model.", "language_model.lm_head."),
    ],
)
def test_the_text_side_of_a_multimodal_checkpoint_is_found(tmp_path, body, head):
    tensors = random_tensors()
    named = {
        name.replace("model.", body, 1).replace("lm_head.", head): w for name, w in tensors.items()
    }
    named["vision_tower.blocks.0.weight"] = named["vision_tower.blocks.1.weight"] = np.ones(2)
    save_file(named, tmp_path / SINGLE)
    assert_is(load_target(tmp_path, table()), table(), tensors)
    assert unused_tensors(tmp_path, table()) == [
        f"only the language model, {body}*, is read",
        "vision_tower.*: 2 tensors",
    ]


@pytest.mark.parametrize("piece", [1, 300, 1000, 1 << 20])
def test_pieces_of_any_size_make_the_same_parameters(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(loading, "_PIECE", piece)
    tensors = random_tensors()
    save_file(tensors, tmp_path / SINGLE)
    assert_is(load_target(tmp_path, table()), table(), tensors)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("fsdp", "tensor", "data"))
    rules = [("target_embed", ["fsdp"]), ("target_mlp", ["tensor"]), ("target_vocab", ["tensor"])]
    placement = shardings(table(), mesh, rules)
    assert_is(load_target(tmp_path, table(), placement), table(), tensors)


def test_names_without_their_prefix_are_not_guessed(tmp_path):
    tensors = {name.removeprefix("model."): w for name, w in random_tensors().items()}
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"'embed_tokens\.weight' where 'model\.embed_tokens"):
        load_target(tmp_path, table())


def test_one_device_holds_only_its_rows_of_a_row_split(tmp_path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / SINGLE)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    place = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), table())
    place["embed"] = NamedSharding(mesh, PartitionSpec("x"))
    embed = load_target(tmp_path, table(), place)["embed"]
    part = embed.addressable_shards[1]
    np.testing.assert_array_equal(part.data, tensors["model.embed_tokens.weight"][8:16])


def test_a_dimension_that_cannot_be_split_is_named():
    mesh = Mesh(np.array(jax.devices()[:5]), ("fsdp",))
    with pytest.raises(sharding.ShardingError, match="32 cannot be split over 5"):
        shardings(table(), mesh, [("target_embed", ["fsdp"])])
