"""convert/: the exported head, the engines' reading of it, and the way back.

What an export must hold is written out here by hand; every damage an engine would load without a
word must be found.
"""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import models
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from MaxDraft.convert.engines.report import engine_report
from MaxDraft.convert.heads.check import ExportError, chain_differences, check_export
from MaxDraft.convert.heads.export import export_head, rope_fields
from MaxDraft.convert.heads.load import load_head
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.drafts.eagle3.numpy_twin import EngineHead
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import shardings
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import hf_config

V, D = 50, 20
IDS = np.sort(np.random.default_rng(5).choice(V, D, replace=False)).astype(np.int32)
CAPTURE = (1, 7, 12)  # the default layers of a target with 16
ROPES = {
    "default": Rope(theta=500000.0, rotary_dim=8),
    "linear": Rope(theta=10000.0, rotary_dim=8, rope_type="linear", factor=4.0),
    "llama3": Rope(
        theta=500000.0,
        rotary_dim=8,
        rope_type="llama3",
        factor=32.0,
        original_max_position_embeddings=64,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "yarn": Rope(
        theta=1e6,
        rotary_dim=8,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        attention_scaling=0.1 * float(np.log(4.0)) + 1.0,
    ),
    "yarn, all said": Rope(
        theta=1e6,
        rotary_dim=8,
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=64,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        attention_scaling=1.25,
    ),
}
TARGET_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "vocab_size": V,
    "num_hidden_layers": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": False,
}


def head_dims(rope=ROPES["llama3"], **changes):
    dims = models.tiny_head_dims(models.tiny_dims(V), D)
    return dataclasses.replace(dims, rope=rope, **changes)


def vocabulary():
    return DraftVocabulary(IDS, V)


def exported(folder, rope=ROPES["llama3"], seed=1, **options):
    """-> (folder, params, dims) of an export of a random head."""
    dims = head_dims(rope)
    params = jax.tree.map(np.asarray, models.random_head(dims, seed))
    # Norm weights away from 1, so that a wrong norm shows.
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda w: w if w.ndim > 1 else rng.uniform(0.5, 1.5, w.shape).astype(np.float32), params
    )
    capture, config = options.pop("capture", CAPTURE), options.pop("config", TARGET_CONFIG)
    path = export_head(folder, params, dims, vocabulary(), config, capture, "tiny", **options)
    return path, params, dims


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE)


# -------------------------------------------------------------------------------------- export
def test_an_export_holds_exactly_what_engines_read(tmp_path):
    folder, params, _ = exported(tmp_path / "export")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", SINGLE]
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": V,
        "draft_vocab_size": D,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "rope_parameters": {
            "rope_theta": 500000.0,
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [1, 7, 12],
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": [2, 8, 13],
        "target_model": "tiny",
    }
    tensors = load_file(folder / SINGLE)
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "fc.weight": ("bfloat16", (32, 96)),
        "midlayer.input_layernorm.weight": ("bfloat16", (32,)),
        "midlayer.hidden_norm.weight": ("bfloat16", (32,)),
        "midlayer.self_attn.q_proj.weight": ("bfloat16", (32, 64)),
        "midlayer.self_attn.k_proj.weight": ("bfloat16", (16, 64)),
        "midlayer.self_attn.v_proj.weight": ("bfloat16", (16, 64)),
        "midlayer.self_attn.o_proj.weight": ("bfloat16", (32, 32)),
        "midlayer.post_attention_layernorm.weight": ("bfloat16", (32,)),
        "midlayer.mlp.gate_proj.weight": ("bfloat16", (40, 32)),
        "midlayer.mlp.up_proj.weight": ("bfloat16", (40, 32)),
        "midlayer.mlp.down_proj.weight": ("bfloat16", (32, 40)),
        "norm.weight": ("bfloat16", (32,)),
        "lm_head.weight": ("bfloat16", (D, 32)),
        "d2t": ("int64", (D,)),
        "t2d": ("bool", (V,)),
    }
    np.testing.assert_array_equal(tensors["d2t"] + np.arange(D), IDS)
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), IDS)
    rounded = params["q"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors["midlayer.self_attn.q_proj.weight"], rounded)


@pytest.mark.parametrize("kind", ROPES)
def test_exported_rope_reads_back_in_either_spelling(kind):
    rope = ROPES[kind]
    theta, scaling, parameters = rope_fields(rope)
    old = {"rope_theta": theta, "rope_scaling": scaling, "head_dim": 8}
    new = {"rope_parameters": parameters, "head_dim": 8}
    assert hf_config.rope(old) == hf_config.rope(new) == hf_config.rope(old | new) == rope
    assert (scaling is None) == (kind == "default")


def test_an_earlier_export_stays_until_the_new_one_is_whole(tmp_path):
    folder, *_ = exported(tmp_path / "export", seed=1)
    before = (folder / SINGLE).read_bytes()

    def fail(fresh):
        assert fresh != folder and (fresh / SINGLE).is_file()
        raise RuntimeError("not good enough")

    with pytest.raises(RuntimeError):
        exported(tmp_path / "export", seed=2, check=fail)
    assert (folder / SINGLE).read_bytes() == before
    exported(tmp_path / "export", seed=2)
    assert (folder / SINGLE).read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path):
    folder, *_ = exported(tmp_path / "export")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        exported(tmp_path / "export")
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (target / SINGLE).write_bytes(b"the target")
    with pytest.raises(CheckpointError, match="no export wrote"):
        exported(target)
    assert (target / SINGLE).read_bytes() == b"the target"


def test_what_would_serve_wrongly_is_not_exported(tmp_path):
    dims, out = head_dims(), tmp_path / "export"
    params = models.random_head(dims)

    def export(params=params, kept=IDS, config=TARGET_CONFIG):
        export_head(out, params, dims, DraftVocabulary(kept, V), config, CAPTURE, "tiny")

    with pytest.raises(CheckpointError, match=r"fc\.weight holds numbers that are not finite"):
        export(params={**params, "fc": params["fc"].at[0, 0].set(np.nan)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: expected \[64, 32\]"):
        export(params={**params, "q": params["q"].T})
    with pytest.raises(CheckpointError, match=f"19 of {V} tokens, the head {D} of {V}"):
        export(kept=IDS[:-1])
    with pytest.raises(CheckpointError, match="hidden_size: the head has 32"):
        export(config={**TARGET_CONFIG, "hidden_size": 64})
    assert not list(tmp_path.iterdir())


def test_sharded_parameters_export_as_whole_ones_do(tmp_path):
    _, params, dims = exported(tmp_path / "whole")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    rules = [("draft_embed", ["fsdp"]), ("draft_heads", ["tensor"]), ("draft_vocab", ["tensor"])]
    sharded = jax.device_put(params, shardings(head_params(dims), mesh, rules))
    export_head(tmp_path / "s", sharded, dims, vocabulary(), TARGET_CONFIG, CAPTURE, "tiny")
    whole, parts = ((tmp_path / name / SINGLE).read_bytes() for name in ("whole", "s"))
    assert whole == parts


# ------------------------------------------------------------------- what the engines make of it
@pytest.mark.parametrize("kind", ROPES)
def test_engines_compute_what_was_trained(tmp_path, kind):
    folder, params, dims = exported(tmp_path / "export", ROPES[kind])
    report = check_export(folder, params, dims, vocabulary(), CAPTURE)
    assert report.largest_difference < 1e-5
    assert "4 chains of 3 steps" in str(report)


def transpose(tensors, name="midlayer.self_attn.o_proj.weight"):
    tensors[name] = tensors[name].T  # square: it still loads


def swap_halves(tensors):
    for part in "qkv":
        name = f"midlayer.self_attn.{part}_proj.weight"
        tensors[name] = np.concatenate([tensors[name][:, 32:], tensors[name][:, :32]], 1)


def swap_norms(tensors):
    a, b = "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def reverse_features(tensors):
    fc = tensors["fc.weight"]
    tensors["fc.weight"] = np.concatenate([fc[:, 64:], fc[:, 32:64], fc[:, :32]], 1)


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def absolute_ids(tensors):
    tensors["d2t"] = tensors["d2t"] + np.arange(D)


def shift_t2d(tensors):
    tensors["t2d"] = np.roll(tensors["t2d"], 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (transpose, "o_proj.weight: does not hold the trained numbers"),
        (swap_halves, "q_proj.weight: does not hold the trained numbers"),
        (swap_norms, "hidden_norm.weight: does not hold the trained numbers"),
        (reverse_features, "fc.weight: does not hold the trained numbers"),
        (absolute_ids, "absolute ids where engines add an offset"),
        (shift_t2d, "t2d: does not mark the tokens"),
        (rename("fc.weight", "model.fc.weight"), "fc.weight: missing"),
        (rename("norm.weight", "layers.0.norm.weight"), "engines know no such tensor"),
        (lambda t: t.update(d2t=t["d2t"].astype(np.int32)), "d2t: expected I64"),
        (lambda t: t.pop("d2t"), "d2t: missing"),
        (lambda t: t.update({"norm.weight": t["norm.weight"].astype(np.float32)}), "found F32"),
        (lambda t: transpose(t, "fc.weight"), "fc.weight: expected BF16 [32, 96], found"),
    ],
)
def test_damaged_tensors_are_found(tmp_path, change, told):
    folder, params, dims = exported(tmp_path / "export")
    edit_tensors(folder, change)
    with pytest.raises(ExportError) as error:
        check_export(folder, params, dims, vocabulary(), CAPTURE)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.pop("rope_theta"), "rope_theta is None, must be 500000.0"),
        (lambda c: c.update(rope_theta=1e4), "rope_theta is 10000.0"),
        (lambda c: c.pop("rope_scaling"), "rope_theta and rope_scaling says"),
        (lambda c: c.pop("rope_parameters"), "rope_parameters: config.json has neither"),
        (lambda c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[2, 8, 13]), "eagle"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 7, 12]), "must be [2, 8, 13]"),
        (lambda c: c.pop("draft_vocab_size"), "draft_vocab_size is None"),
        (lambda c: c.update(head_dim=16), "head_dim is 16"),
        (lambda c: c.update(num_key_value_heads=4), "num_key_value_heads is 4"),
        (lambda c: c.pop("pad_token_id"), "pad_token_id is missing"),
    ],
)
def test_a_damaged_config_is_found(tmp_path, change, told):
    folder, params, dims = exported(tmp_path / "export")
    edit_config(folder, change)
    with pytest.raises(ExportError) as error:
        check_export(folder, params, dims, vocabulary(), CAPTURE)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (transpose, None),
        (swap_halves, None),
        (swap_norms, None),
        (reverse_features, None),
        (None, lambda c: c.pop("rope_theta")),
        (None, lambda c: c.update(rope_theta=490000.0)),
        (None, lambda c: c.pop("rope_scaling")),
        (None, lambda c: c.update(rms_norm_eps=1e-3)),
        (None, lambda c: c.update(num_attention_heads=2, num_key_value_heads=1, head_dim=16)),
    ],
)
def test_the_numbers_alone_find_the_damage(tmp_path, tensors, config):
    folder, params, dims = exported(tmp_path / "export")
    if tensors:
        edit_tensors(folder, tensors)
    if config:
        edit_config(folder, config)
    differences = chain_differences(EngineHead(folder), params, dims, steps=3)
    assert max(differences.values()) > 1e-3


def test_other_parameters_than_the_exported_ones_are_found(tmp_path):
    folder, params, dims = exported(tmp_path / "export")
    params = {**params, "v": params["v"] * 1.01}
    with pytest.raises(ExportError, match=r"step 0 differ by[\s\S]*v_proj\.weight: does not hold"):
        check_export(folder, params, dims, vocabulary(), CAPTURE)


def test_a_truncated_export_is_found(tmp_path):
    folder, params, dims = exported(tmp_path / "export")
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:-1])
    with pytest.raises(ExportError, match="is cut off"):
        check_export(folder, params, dims, vocabulary(), CAPTURE)
    (folder / SINGLE).unlink()
    with pytest.raises(ExportError, match=r"no model\.safetensors"):
        check_export(folder, params, dims, vocabulary(), CAPTURE)


# ------------------------------------------------------------------------------ engines' limits
def report_for(tmp_path, target, capture=CAPTURE, **changes):
    folder, *_ = exported(tmp_path / "export", config=TARGET_CONFIG | target, capture=capture)
    head = json.loads((folder / "config.json").read_text()) | changes
    text = engine_report(TARGET_CONFIG | target, head, "/models/my target", str(folder))
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return {block[0].partition(":")[0]: "\n".join(block) for block in blocks}


def test_a_llama_target_is_served_everywhere(tmp_path):
    report = report_for(tmp_path, {})
    engines = {name: text for name, text in report.items() if ": " in text.splitlines()[0]}
    assert len([text for text in engines.values() if ": yes" in text.splitlines()[0]]) == 5
    command = report["sglang-jax"]
    assert "--model-path '/models/my target' --speculative-algorithm EAGLE3" in command
    assert f"--speculative-draft-model-path {tmp_path / 'export'}" in command
    assert "--speculative-num-steps 3 --speculative-num-draft-tokens 4" in command
    assert "override" not in command
    assert '"method": "eagle3"' in report["vLLM (GPU)"]


def test_limits_are_told_where_they_bite(tmp_path):
    tied = report_for(tmp_path, {"tie_word_embeddings": True})
    assert "sglang-jax: no" in tied["sglang-jax"] and "tied embeddings" in tied["sglang-jax"]
    assert "yes" in tied["sglang-jax, the published JAX heads' fork"].splitlines()[0]
    qwen2 = report_for(tmp_path, {"model_type": "qwen2"})
    assert "cannot capture features of 'qwen2'" in qwen2["sglang-jax"]
    assert "Llama only" in qwen2["tpu-inference, JAX path"]
    assert "yes" in qwen2["SGLang (GPU)"].splitlines()[0]
    one = report_for(tmp_path, {}, num_key_value_heads=1)
    assert "one key/value head crashes it" in one["sglang-jax"]
    other = report_for(tmp_path, {}, capture=(0, 7, 15))
    override = '--json-model-override-args \'{"eagle_config": '
    assert override + '{"eagle_aux_hidden_state_layer_ids": [0, 7, 15]' in other["sglang-jax"]
    assert "default captured layers" in other["tpu-inference, JAX path"]


# -------------------------------------------------------------------------------------- import
def assert_same_head(head, params, dims):
    assert head.dims == dims
    assert jax.tree.structure(head.params) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(head.params), jax.tree.leaves(params), strict=True):
        assert ours.dtype == np.float32
        rounded = theirs.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(ours), rounded)
    np.testing.assert_array_equal(head.vocabulary.draft_to_target, IDS)
    assert head.vocabulary.target_vocab_size == V


@pytest.mark.parametrize("kind", ROPES)
def test_an_export_comes_back(tmp_path, kind):
    folder, params, dims = exported(tmp_path / "export", ROPES[kind])
    head = load_head(folder, dims, CAPTURE)
    assert_same_head(head, params, dims)
    assert head.capture == CAPTURE


def as_published(folder):
    """The same head as the PyTorch trainers save it: no t2d, the embedding along, few fields."""
    edit_tensors(
        folder,
        lambda t: (t.pop("t2d"), t.update({"embed_tokens.weight": np.ones((V, 32), np.float32)})),
    )
    edit_config(
        folder,
        lambda c: [c.pop(k) for k in ("rope_parameters", "eagle_aux_hidden_state_layer_ids")],
    )


def as_speculators(folder):
    """The same head as a speculators folder."""

    def nest(config):
        layer = {
            name: config.pop(name)
            for name in list(config)
            if name not in ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids")
        }
        for name in ("architectures", "eagle_config", "rope_theta", "rope_scaling"):
            layer.pop(name)
        config |= {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "norm_before_residual": False,
            "transformer_layer_config": layer,
            "speculators_config": {"algorithm": "eagle3"},
        }

    def names(tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    edit_config(folder, nest)
    edit_tensors(folder, names)


@pytest.mark.parametrize("respell", [as_published, as_speculators])
def test_other_spellings_of_a_head_come_in(tmp_path, respell):
    folder, params, dims = exported(tmp_path / "export")
    respell(folder)
    head = load_head(folder, dims, CAPTURE)
    assert_same_head(head, params, dims)
    assert head.capture == CAPTURE


def test_a_head_loads_onto_a_mesh(tmp_path):
    folder, params, dims = exported(tmp_path / "export")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    rules = [("draft_embed", ["fsdp"]), ("draft_mlp", ["tensor"])]
    placement = shardings(head_params(dims), mesh, rules)
    head = load_head(folder, dims, placement=placement)
    assert_same_head(head, params, dims)
    assert head.params["mlp"]["up"].sharding == placement["mlp"]["up"]


def test_all_differences_from_the_run_are_in_one_error(tmp_path):
    folder, *_ = exported(tmp_path / "export")
    edit_tensors(folder, lambda t: t.pop("norm.weight"))
    expected = head_dims(ROPES["default"], intermediate_size=48, target_vocab_size=51)
    with pytest.raises(CheckpointError) as error:
        load_head(folder, expected, (1, 6, 12))
    text = str(error.value)
    for part in (
        "norm.weight: missing, expected [32]",
        "intermediate_size: the head has 40, this run 48",
        "vocab_size: the head has 50, this run 51",
        "rope: the head has Rope(theta=500000.0, rotary_dim=8, rope_type='llama3'",
        "captured layers: the head reads [1, 7, 12], this run has [1, 6, 12]",
    ):
        assert part in text


@pytest.mark.parametrize("with_t2d", [True, False])
def test_absolute_ids_are_told(tmp_path, with_t2d):
    folder, *_ = exported(tmp_path / "export")
    edit_tensors(folder, lambda t: (absolute_ids(t), with_t2d or t.pop("t2d")))
    with pytest.raises(CheckpointError, match="d2t holds absolute target ids"):
        load_head(folder)


def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path):
    folder, *_ = exported(tmp_path / "export")
    edit_tensors(folder, shift_t2d)
    with pytest.raises(CheckpointError, match="t2d marks other tokens"):
        load_head(folder)
    edit_tensors(folder, lambda t: t.pop("d2t"))
    with pytest.raises(CheckpointError, match=f"d2t: missing, .* {D} of {V}"):
        load_head(folder)


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        (lambda t: t.update(bias=t["norm.weight"]), None, "bias: no such tensor"),
        (None, lambda c: c.update(norm_before_residual=True), "norm_before_residual: is true"),
        (None, lambda c: c.update(num_hidden_layers=2), "num_hidden_layers: is 2"),
        (None, lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 7, 12]), "plus one"),
        (None, lambda c: c.pop("rms_norm_eps"), "has no rms_norm_eps"),
        (None, lambda c: c.update(hidden_act="gelu"), "not known"),
        (None, lambda c: c.update(hidden_act="gelu_pytorch_tanh"), "a head's is silu"),
        (None, lambda c: c.update(partial_rotary_factor=0.5), "turns whole heads"),
        (None, lambda c: c.update(rope_theta=1e4), "contradicts itself"),
    ],
)
def test_a_head_that_computes_something_else_is_refused(tmp_path, tensors, config, told):
    folder, *_ = exported(tmp_path / "export")
    if tensors:
        edit_tensors(folder, tensors)
    if config:
        edit_config(folder, config)
    with pytest.raises(CheckpointError, match=told):
        load_head(folder)


def test_a_head_without_rope_is_one_with_the_engines_default(tmp_path):
    folder, _, dims = exported(tmp_path / "export")
    rope = ("rope_theta", "rope_scaling", "rope_parameters")
    edit_config(folder, lambda c: [c.pop(name) for name in rope])
    with pytest.raises(CheckpointError, match=r"rope: the head has Rope\(theta=10000\.0"):
        load_head(folder, dims)
    assert load_head(folder).dims.rope == Rope(theta=10000.0, rotary_dim=8)


def test_a_head_that_names_no_layers_has_the_default_ones(tmp_path):
    folder, _, dims = exported(tmp_path / "export")
    names = ("eagle_config", "eagle_aux_hidden_state_layer_ids")
    edit_config(folder, lambda c: [c.pop(name) for name in names])
    assert load_head(folder, dims, CAPTURE).capture is None
    with pytest.raises(CheckpointError, match=r"names none.*this run has \[0, 7, 15\]"):
        load_head(folder, dims, (0, 7, 15))


def test_a_whole_vocabulary_needs_no_map(tmp_path):
    dims = head_dims(draft_vocab_size=V)
    params, whole = models.random_head(dims), DraftVocabulary(np.arange(V, dtype=np.int32), V)
    folder = tmp_path / "export"
    export_head(folder, params, dims, whole, TARGET_CONFIG, CAPTURE, "tiny")
    assert not load_file(folder / SINGLE)["d2t"].any()
    check_export(folder, params, dims, whole, CAPTURE)
    copy = shutil.copytree(folder, tmp_path / "bare")
    edit_tensors(copy, lambda t: (t.pop("d2t"), t.pop("t2d")))
    for path in (folder, copy):
        ids = load_head(path, dims).vocabulary.draft_to_target
        np.testing.assert_array_equal(ids, np.arange(V))
    edit_tensors(folder, lambda t: t.update(d2t=np.arange(V)))
    with pytest.raises(CheckpointError, match="absolute"):
        load_head(folder)
    with pytest.raises(ExportError, match="absolute"):
        check_export(folder, params, dims, whole, CAPTURE)
