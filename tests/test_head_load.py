"""Heads come in from every spelling, or are refused by name."""

import shutil

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
    absolute_ids,
    edit_config,
    edit_tensors,
    exported,
    head_dims,
    shift_t2d,
)
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from MaxDraft.convert.heads.check import ExportError, check_export
from MaxDraft.convert.heads.export import export_head
from MaxDraft.convert.heads.load import TargetFolder, load_head, open_head, warm_drafter
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import shardings
from MaxDraft.layers.rope import Rope

EMBEDDING = np.random.default_rng(7).normal(size=(V, 32)).astype(ml_dtypes.bfloat16)
EMBEDDING = EMBEDDING.astype(np.float32)  # a copy of the target's that was saved in float32
TARGET_DIMS = models.llama(V, 32, 48, num_layers=16, num_heads=4, num_kv_heads=2, head_dim=8)


def load(folder, drafter, captured_layers=CAPTURED_LAYERS, **options):
    return load_head(folder, drafter, captured_layers, **options)


def assert_same_head(head, params):
    assert jax.tree.structure(head.params) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(head.params), jax.tree.leaves(params), strict=True):
        assert ours.dtype == np.float32
        rounded = theirs.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(ours), rounded)
    np.testing.assert_array_equal(head.vocabulary.draft_to_target, IDS)
    assert head.vocabulary.target_vocab_size == V


@pytest.mark.parametrize("kind", ROPES)
def test_an_export_comes_back(tmp_path, kind):
    folder, params, drafter = exported(tmp_path / "export", ROPES[kind])
    assert_same_head(load(folder, drafter), params)
    assert open_head(folder, Eagle3).captured_layers == CAPTURED_LAYERS


def target_folder(path, embedding):
    """A target of which there is only the embedding."""
    path.mkdir()
    embedding = embedding.astype(ml_dtypes.bfloat16)
    save_file({"model.embed_tokens.weight": embedding}, path / SINGLE)
    return TargetFolder(path, TARGET_DIMS)


def as_published(folder):
    """The same head as the PyTorch trainers save it: no t2d, the embedding along, few fields."""
    edit_tensors(
        folder,
        lambda t: (t.pop("t2d"), t.update({"embed_tokens.weight": EMBEDDING})),
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
    folder, params, drafter = exported(tmp_path / "export")
    respell(folder)
    target = target_folder(tmp_path / "target", EMBEDDING)
    assert_same_head(load(folder, drafter, target=target), params)
    assert open_head(folder, Eagle3).captured_layers == CAPTURED_LAYERS


def test_an_embedding_of_its_own_is_refused(tmp_path):
    folder, _, drafter = exported(tmp_path / "export")
    as_published(folder)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: no target is given"):
        load(folder, drafter)
    trained = EMBEDDING.copy()
    trained[33, 4] *= 1.01
    target = target_folder(tmp_path / "target", trained)
    with pytest.raises(CheckpointError, match=r"differs from the target's embedding, .* token 33"):
        load(folder, drafter, target=target)


def test_a_rounded_copy_of_the_embedding_is_a_copy(tmp_path):
    # The target in float32, the copy in bfloat16, as trainers that train in bfloat16 save it.
    folder, params, drafter = exported(tmp_path / "export")
    full = np.random.default_rng(8).normal(size=(V, 32)).astype(np.float32)
    name = "embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({name: full.astype(ml_dtypes.bfloat16)}))
    (tmp_path / "target").mkdir()
    save_file({"model.embed_tokens.weight": full}, tmp_path / "target" / SINGLE)
    target = TargetFolder(tmp_path / "target", TARGET_DIMS)
    assert_same_head(load(folder, drafter, target=target), params)


def test_a_head_loads_onto_a_mesh(tmp_path):
    folder, params, drafter = exported(tmp_path / "export")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    rules = [("draft_embed", ["fsdp"]), ("draft_mlp", ["tensor"])]
    placement = shardings(drafter.params_table(), mesh, rules)
    head = load(folder, drafter, placement=placement)
    assert_same_head(head, params)
    assert head.params["mlp"]["up"].sharding == placement["mlp"]["up"]


def test_all_differences_from_the_run_are_in_one_error(tmp_path):
    folder, *_ = exported(tmp_path / "export")
    edit_tensors(folder, lambda t: t.pop("norm.weight"))
    expected = Eagle3(head_dims(ROPES["default"], intermediate_size=48, target_vocab_size=51))
    with pytest.raises(CheckpointError) as error:
        load(folder, expected, (1, 6, 12))
    text = str(error.value)
    for part in (
        "norm.weight: missing, expected [32]",
        "intermediate_size: the head has 40, this run 48; set draft_intermediate_size=40",
        "vocab_size: the head has 50, this run 51",
        "rope: the head has Rope(theta=500000.0, rotary_dim=8, rope_type='llama3'",
        "captured layers: the head reads [1, 7, 12], this run has [1, 6, 12]; "
        "set target_layer_ids=[1,7,12]",
    ):
        assert part in text


@pytest.mark.parametrize("with_t2d", [True, False])
def test_absolute_ids_are_named(tmp_path, with_t2d):
    folder, _, drafter = exported(tmp_path / "export")
    edit_tensors(folder, lambda t: (absolute_ids(t), with_t2d or t.pop("t2d")))
    with pytest.raises(CheckpointError, match="d2t holds absolute target ids"):
        load(folder, drafter)


def test_a_vocabulary_that_contradicts_itself_is_refused(tmp_path):
    folder, _, drafter = exported(tmp_path / "export")
    edit_tensors(folder, shift_t2d)
    with pytest.raises(CheckpointError, match="t2d marks other tokens"):
        load(folder, drafter)
    edit_tensors(folder, lambda t: t.pop("d2t"))
    with pytest.raises(CheckpointError, match=rf"d2t: expected I64 or I32 \[{D}\], it is missing"):
        load(folder, drafter)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            lambda t: t.update(bias=t["norm.weight"]),
            None,
            "bias: drafter=eagle3 has no such",
        ),
        (None, lambda c: c.update(norm_before_residual=True), "norm_before_residual: is true"),
        (None, lambda c: c.update(num_hidden_layers=2), "num_hidden_layers: is 2"),
        (None, lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 7, 12]), "plus one"),
        (None, lambda c: c.pop("rms_norm_eps"), "has no rms_norm_eps"),
        (None, lambda c: c.update(hidden_act="gelu"), "not known"),
        (None, lambda c: c.update(hidden_act="gelu_pytorch_tanh"), "a head's is silu"),
        (None, lambda c: c.update(partial_rotary_factor=0.5), "whole heads"),
        (None, lambda c: c.update(rope_theta=1e4), "contradicts itself"),
    ],
)
def test_a_head_that_computes_something_else_is_refused(tmp_path, tensors, config, message):
    folder, _, drafter = exported(tmp_path / "export")
    if tensors:
        edit_tensors(folder, tensors)
    if config:
        edit_config(folder, config)
    with pytest.raises(CheckpointError, match=message):
        load(folder, drafter)


def test_a_head_without_rope_is_one_with_the_engines_default(tmp_path):
    folder, _, drafter = exported(tmp_path / "export")
    rope = ("rope_theta", "rope_scaling", "rope_parameters")
    edit_config(folder, lambda c: [c.pop(name) for name in rope])
    with pytest.raises(CheckpointError, match=r"rope: the head has Rope\(theta=10000\.0"):
        load(folder, drafter)
    assert warm_drafter(folder, drafter).dims.rope == Rope(theta=10000.0, rotary_dim=8)


def test_a_head_that_names_no_layers_has_the_default_ones(tmp_path):
    folder, params, drafter = exported(tmp_path / "export")
    names = ("eagle_config", "eagle_aux_hidden_state_layer_ids")
    edit_config(folder, lambda c: [c.pop(name) for name in names])
    assert open_head(folder, Eagle3).captured_layers is None
    target = TargetFolder(tmp_path, TARGET_DIMS)
    assert_same_head(load(folder, drafter, target=target), params)
    with pytest.raises(CheckpointError, match="no target is given"):
        load(folder, drafter)
    with pytest.raises(CheckpointError, match=r"names none.*this\s+run has \[0, 7, 15\]"):
        load(folder, drafter, (0, 7, 15), target=target)


def test_a_whole_vocabulary_needs_no_map(tmp_path):
    drafter = Eagle3(head_dims(draft_vocab_size=V))
    params, whole = (
        models.random_head(drafter.dims),
        DraftVocabulary(np.arange(V, dtype=np.int32), V),
    )
    folder = tmp_path / "export"
    export_head(folder, params, drafter, whole, TARGET_CONFIG, CAPTURED_LAYERS, "tiny")
    assert not load_file(folder / SINGLE)["d2t"].any()
    check_export(folder, params, drafter, whole, CAPTURED_LAYERS)
    copy = shutil.copytree(folder, tmp_path / "bare")
    edit_tensors(copy, lambda t: (t.pop("d2t"), t.pop("t2d")))
    for path in (folder, copy):
        ids = load(path, drafter).vocabulary.draft_to_target
        np.testing.assert_array_equal(ids, np.arange(V))
    edit_tensors(folder, lambda t: t.update(d2t=np.arange(V)))
    with pytest.raises(CheckpointError, match="absolute"):
        load(folder, drafter)
    with pytest.raises(ExportError, match="absolute"):
        check_export(folder, params, drafter, whole, CAPTURED_LAYERS)
