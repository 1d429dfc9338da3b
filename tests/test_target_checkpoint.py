"""convert/: reading safetensors, config.json checks, and the target on its devices.

Files are written by the safetensors library or by hand, never by the code under test.
"""

import json
from pathlib import Path
from types import MappingProxyType

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
from MaxDraft.convert.loading import load_parameters
from MaxDraft.convert.read_tensor import Source
from MaxDraft.convert.safetensors_files import INDEX, SINGLE, open_safetensors
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.convert.target.checkpoint import (
    load_target,
    read_config,
    target_fingerprint,
    unused_tensors,
)
from MaxDraft.convert.target.config_check import check_target_config
from MaxDraft.layers.params import Param, Part, TensorLayout, flatten, shardings
from MaxDraft.targets.table import decoder_params

BASE_YML = Path(__file__).parent.parent / "configs" / "base.yml"
DIMS = models.tiny_dims(vocab_size=32)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


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


# ------------------------------------------------------------------------------- config.json
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
def test_a_partial_rotary_embedding_is_compared_wherever_it_stands(place):
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


@pytest.mark.parametrize(
    ("place", "rows"),
    [((None, "a"), (None, None, "a")), ((None, "a", "b"), (None, None, ("b", "a")))],
)
def test_devices_exchange_what_they_read_and_gather_nothing(place, rows):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    place, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (place, rows))
    param = Param((32, 48), (None, None), "{layer}", transposed=True, layers=range(3))
    assert loading._whole_rows(param, place, by_outputs=True).spec == rows.spec
    _, move, _ = loading._exchange(place, np.dtype(jnp.bfloat16))
    text = (
        move.lower(jax.ShapeDtypeStruct((1, 32, 48), np.uint16, sharding=rows)).compile().as_text()
    )
    assert "all-to-all" in text and "all-gather" not in text and "f32" not in text


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


# ------------------------------------------------------------------------------------- layouts
E, IN, OUT = 4, 6, 10


def load_one(folder, tensors, param, placement=None):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / SINGLE)
    return np.asarray(load_parameters(folder, open_safetensors(folder), param, placement))


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("part", [None, Part(0, 20), Part(10, 20), Part(0, 20, 2), Part(1, 20, 2)])
@pytest.mark.parametrize("piece", [600, 1 << 20])  # two experts, everything
def test_experts_load_as_the_files_hold_them(
    tmp_path, monkeypatch, per_expert, transposed, part, piece
):
    monkeypatch.setattr(loading, "_PIECE", piece)
    name = "layers.{layer}.experts." + ("{expert}.w" if per_expert else "w")
    total = part.total if part else OUT
    whole = np.random.default_rng(0).standard_normal((2, E, IN, total), np.float32)
    tensors = {}
    for at, layer in enumerate((3, 5)):
        stored = whole[at].swapaxes(-1, -2) if transposed else whole[at]
        if per_expert:
            tensors |= {f"layers.{layer}.experts.{e}.w": stored[e] for e in range(E)}
        else:
            tensors[f"layers.{layer}.experts.w"] = stored
    expected = whole
    if part:
        expected = whole[..., part.start : part.start + OUT * part.step : part.step]
    axes = ("target_experts", "target_expert_embed", "target_expert_mlp")
    param = Param((E, IN, OUT), axes, name, transposed=transposed, layers=range(3, 6, 2), part=part)
    np.testing.assert_array_equal(load_one(tmp_path, tensors, param), expected)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    for spec in [(None, "a", "b"), (None, ("a", "c")), (None, None, None, "c"), (None, None, "a")]:
        placement = NamedSharding(mesh, PartitionSpec(*spec))
        np.testing.assert_array_equal(load_one(tmp_path, tensors, param, placement), expected)


@pytest.mark.parametrize("part", [None, Part(10, 20), Part(1, 20, 2)])
def test_biases_of_experts_load_likewise(tmp_path, part):
    whole = np.random.default_rng(0).standard_normal((E, part.total if part else OUT), np.float32)
    param = Param((E, OUT), ("target_experts", None), "b", part=part)
    expected = whole
    if part:
        expected = whole[:, part.start : part.start + OUT * part.step : part.step]
    np.testing.assert_array_equal(load_one(tmp_path, {"b": whole}, param), expected)


def test_the_first_layout_whose_tensors_are_there_is_taken(tmp_path):
    whole = np.random.default_rng(0).standard_normal((2 * OUT, IN), np.float32)
    param = Param(
        (IN, OUT),
        (None, None),
        "q.weight",
        transposed=True,
        other_layouts=(
            TensorLayout("qkv.weight", True, Part(5, 2 * OUT)),
            TensorLayout("q_in_out"),
        ),
    )
    loaded = load_one(tmp_path, {"qkv.weight": whole}, param)
    np.testing.assert_array_equal(loaded, whole[5:15].T)
    loaded = load_one(tmp_path, {"qkv.weight": whole, "q.weight": whole[:OUT]}, param)
    np.testing.assert_array_equal(loaded, whole[:OUT].T)
    np.testing.assert_array_equal(
        load_one(tmp_path, {"q_in_out": whole[:OUT].T}, param), whole[:OUT].T
    )
    with pytest.raises(CheckpointError, match=r"q\.weight: missing, expected \[10, 6\]"):
        load_one(tmp_path, {"k.weight": whole}, param)
    with pytest.raises(CheckpointError, match=r"qkv\.weight: expected \[20, 6\], found \[6, 20\]"):
        load_one(tmp_path, {"qkv.weight": whole.T}, param)


def test_a_convolution_loads_without_its_dimension_of_one(tmp_path):
    kernel = np.random.default_rng(0).standard_normal((12, 1, 4), np.float32)
    param = Param((4, 12), (None, None), "conv.weight", transposed=True)
    loaded = load_one(tmp_path, {"conv.weight": kernel}, param)
    np.testing.assert_array_equal(loaded, kernel[:, 0].T)


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
