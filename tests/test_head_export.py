"""An export holds what engines read, and replaces nothing but an export."""

import json

import jax
import ml_dtypes
import models
import numpy as np
import pytest
from head_helpers import (
    CAPTURED_LAYERS,
    IDS,
    ROPES,
    TARGET_CONFIG,
    D,
    V,
    exported,
    head_dims,
    vocabulary,
)
from jax.sharding import Mesh
from safetensors.numpy import load_file

from MaxDraft.convert.heads.export import export_head
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.drafts.rope_fields import rope_fields
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import shardings
from MaxDraft.targets import hf_config


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
    drafter, out = Eagle3(head_dims()), tmp_path / "export"
    params = models.random_head(drafter.dims)

    def export(params=params, draft_ids=IDS, config=TARGET_CONFIG):
        export_head(
            out, params, drafter, DraftVocabulary(draft_ids, V), config, CAPTURED_LAYERS, "tiny"
        )

    with pytest.raises(CheckpointError, match=r"fc\.weight holds numbers that are not finite"):
        export(params={**params, "fc": params["fc"].at[0, 0].set(np.nan)})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: expected \[64, 32\]"):
        export(params={**params, "q": params["q"].T})
    with pytest.raises(CheckpointError, match=f"19 of {V} tokens, the head {D} of {V}"):
        export(draft_ids=IDS[:-1])
    with pytest.raises(CheckpointError, match="hidden_size: the head has 32"):
        export(config={**TARGET_CONFIG, "hidden_size": 64})
    assert not list(tmp_path.iterdir())


def test_sharded_parameters_export_as_whole_ones_do(tmp_path):
    _, params, drafter = exported(tmp_path / "whole")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    rules = [("draft_embed", ["fsdp"]), ("draft_heads", ["tensor"]), ("draft_vocab", ["tensor"])]
    sharded = jax.device_put(params, shardings(drafter.params_table(), mesh, rules))
    export_head(
        tmp_path / "s", sharded, drafter, vocabulary(), TARGET_CONFIG, CAPTURED_LAYERS, "tiny"
    )
    whole, parts = ((tmp_path / name / SINGLE).read_bytes() for name in ("whole", "s"))
    assert whole == parts
