"""Every damage that an engine would load without a word is found in an export."""

import numpy as np
import pytest
from head_helpers import (
    CAPTURED_LAYERS,
    ROPES,
    absolute_ids,
    edit_config,
    edit_tensors,
    exported,
    rename,
    reverse_features,
    shift_t2d,
    swap_halves,
    swap_norms,
    transpose,
    vocabulary,
)

from MaxDraft.convert.heads.check import ExportError, check_export
from MaxDraft.convert.safetensors_files import SINGLE


@pytest.mark.parametrize("kind", ROPES)
def test_engines_compute_what_was_trained(tmp_path, kind):
    folder, params, drafter = exported(tmp_path / "export", ROPES[kind])
    report = check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)
    assert report.largest_difference < 1e-5
    assert "logits of 12 drafts" in str(report)


@pytest.mark.parametrize(
    ("change", "expected"),
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
def test_damaged_tensors_are_found(tmp_path, change, expected):
    folder, params, drafter = exported(tmp_path / "export")
    edit_tensors(folder, change)
    with pytest.raises(ExportError) as error:
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
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
def test_a_damaged_config_is_found(tmp_path, change, expected):
    folder, params, drafter = exported(tmp_path / "export")
    edit_config(folder, change)
    with pytest.raises(ExportError) as error:
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)
    assert expected in str(error.value)


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
    folder, params, drafter = exported(tmp_path / "export")
    if tensors:
        edit_tensors(folder, tensors)
    if config:
        edit_config(folder, config)
    differences = drafter.checkpoint_format.twin_differences(folder, params, drafter.dims, 3)
    assert max(differences.values()) > 1e-3


def test_other_parameters_than_the_exported_ones_are_found(tmp_path):
    folder, params, drafter = exported(tmp_path / "export")
    params = {**params, "v": params["v"] * 1.01}
    with pytest.raises(
        ExportError, match=r"step 0: the logits differ by[\s\S]*v_proj\.weight: does not hold"
    ):
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)


def test_a_truncated_export_is_found(tmp_path):
    folder, params, drafter = exported(tmp_path / "export")
    raw = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[:-1])
    with pytest.raises(ExportError, match="is cut off"):
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)
    (folder / SINGLE).unlink()
    with pytest.raises(ExportError, match=r"no model\.safetensors"):
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)
