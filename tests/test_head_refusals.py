"""A head that computes something else, or says what is not understood, is refused by name."""

import json

import models
import numpy as np
import pytest
from head_helpers import CAPTURED_LAYERS, D, V, edit_config, edit_tensors, exported

from MaxDraft.convert.heads.load import load_head, open_head
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3.drafter import Eagle3

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def assert_refused(folder, drafter, *messages):
    with pytest.raises(CheckpointError) as error:
        load_head(folder, drafter, CAPTURED_LAYERS)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 36},
        {"sliding_window": 128, "use_sliding_window": False},
        {"sliding_window": 4096},  # as long as the longest sequence
        {"sliding_window": 128, "layer_types": ["full_attention"]},
        {"layer_types": ["full_attention"] * 36},
        {"pretraining_tp": 1, "quantization_config": None, "target_hidden_size": 32},
        {"unheard_of": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(tmp_path, fields):
    folder, _, drafter = exported(tmp_path / "export")
    edit_config(folder, lambda config: config.update(fields))
    assert load_head(folder, drafter, CAPTURED_LAYERS).vocabulary.size == D


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 128}, "sliding_window: is 128; the head is trained and run with full"),
        ({"sliding_window": 128, "use_sliding_window": True}, "sliding_window: is 128"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: is ['sliding_attention']"),
        ({"layer_types": [["full_attention"]]}, "layer_types: is"),
        ({"use_mla": True}, "use_mla: true is not understood"),
        ({"rope_interleaved": False}, "rope_interleaved: false is not understood"),
        ({"pretraining_tp": 2}, "pretraining_tp: is 2, which this head does not compute, only 1"),
        ({"target_hidden_size": 64}, "target_hidden_size: is 64"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number above 0, not '1e-6'"),
        ({"hidden_size": [32]}, "hidden_size must be a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads must be a whole number"),
        ({"draft_vocab_size": V + 1}, "draft_vocab_size: 51 is above vocab_size 50"),
        ({"eagle_config": [1, 2]}, "eagle_config must be an object"),
        ({"eagle_config": {LAYER_IDS: "1,7,12"}}, f"{LAYER_IDS} must be a list"),
        ({LAYER_IDS: [2, 8.5, 13]}, f"{LAYER_IDS}: [2, 8.5, 13] is no list of layer numbers"),
        (
            {"eagle_config": {LAYER_IDS: [1, 7, 12], "use_mtp_layernorm": True}},
            "eagle_config.use_mtp_layernorm: is true, which this head does not compute, only false",
        ),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
    ],
)
def test_fields_that_change_the_head_are_refused(tmp_path, fields, message):
    folder, _, drafter = exported(tmp_path / "export")
    edit_config(folder, lambda config: config.update(fields))
    assert_refused(folder, drafter, message)


def test_all_wrong_fields_are_in_one_error(tmp_path):
    folder, _, drafter = exported(tmp_path / "export")
    edit_config(folder, lambda c: c.update(use_mla=True, sliding_window=128, attention_bias=True))
    assert_refused(
        folder, drafter, "use_mla: true", "sliding_window: is 128", "attention_bias: is true"
    )


def to_speculators_names(tensors):
    for name in [name for name in tensors if name.startswith("midlayer.")]:
        tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)


def test_the_tensors_tell_their_names_not_the_config(tmp_path):
    folder, _, drafter = exported(tmp_path / "flat")
    edit_tensors(folder, to_speculators_names)
    assert load_head(folder, drafter, CAPTURED_LAYERS).vocabulary.size == D

    folder, _, drafter = exported(tmp_path / "nested")

    def nest(config):
        config["transformer_layer_config"] = dict(config)

    edit_config(folder, nest)
    assert load_head(folder, drafter, CAPTURED_LAYERS).vocabulary.size == D


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_names_its_tensor(tmp_path, value):
    folder, _, drafter = exported(tmp_path / "export")
    name = "midlayer.mlp.up_proj.weight"

    def damage(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 4] = value

    edit_tensors(folder, damage)
    assert_refused(folder, drafter, f"{name} in ", "holds NaN or infinity")


@pytest.mark.parametrize("dtype", [np.bool_, np.float32, np.uint8])
def test_offsets_of_another_dtype_are_refused(tmp_path, dtype):
    folder, _, drafter = exported(tmp_path / "export")
    edit_tensors(folder, lambda tensors: tensors.update(d2t=tensors["d2t"].astype(dtype)))
    assert_refused(folder, drafter, f"d2t: expected I64 or I32 [{D}], found ")


@pytest.mark.parametrize(
    ("architectures", "kind"),
    [
        (
            ["DFlashDraftModel"],
            "holds no drafter that is known (architectures ['DFlashDraftModel'])",
        ),
        (["LlamaForCausalLM", "x"], "holds no drafter that is known"),
        ({"a": 1}, "holds no drafter that is known"),
    ],
)
def test_a_folder_of_another_kind_names_both_kinds(tmp_path, architectures, kind):
    folder, _, drafter = exported(tmp_path / "export")
    edit_config(folder, lambda config: config.update(architectures=architectures))
    assert_refused(folder, drafter, kind, "this run has drafter=eagle3")


def test_a_target_is_no_head(tmp_path):
    folder = tmp_path / "target"
    models_config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(models_config))
    exported(tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").rename(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.pop("fc.weight"))
    with pytest.raises(CheckpointError, match="holds no drafter that is known"):
        open_head(folder, Eagle3)


def test_the_architecture_of_tpu_inference_is_read(tmp_path):
    folder, _, drafter = exported(tmp_path / "export")
    edit_config(folder, lambda config: config.update(architectures=["LlamaForCausalLM"]))
    assert load_head(folder, drafter, CAPTURED_LAYERS).vocabulary.size == D
    assert drafter.dims.hidden_size == models.tiny_dims().hidden_size
