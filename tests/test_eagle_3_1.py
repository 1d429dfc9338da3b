"""EAGLE-3.1 (arXiv:2605.09992): fc_norm and norm_output, each alone and both together.

Trained as a slow float64 reference says, drafted as the NumPy twin says, exported and read again.
"""

import dataclasses
import json

import harness
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from head_helpers import CAPTURED_LAYERS, edit_config, edit_tensors, exported, head_dims, vocabulary
from safetensors.numpy import load_file

from MaxDraft.convert.heads.check import ExportError, check_export
from MaxDraft.convert.heads.load import load_head
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3 import decoding
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.drafts.eagle3.numpy_twin import NumpyTwin

FLAGS = [("fc_norm",), ("norm_output",), ("fc_norm", "norm_output")]
LAYOUT = ("ppp11111pp2222|pp11111..", "p1111111p1p222|pp1111222")
TOLERANCE = 1e-4  # max |a-b| / max |b|, float32 at highest precision against float64
STEPS = 3

each_flag = pytest.mark.parametrize("flags", FLAGS, ids="+".join)


def problem(flags, seed=0):
    head = reference.Head(4, 2, 6, **dict.fromkeys(flags, True))
    return reference.make_problem(LAYOUT, seed, head=head)


# ---------------------------------------------------------------------------------------- training
@each_flag
def test_losses_and_gradients_equal_the_reference(flags):
    pytest.importorskip("torch")
    example = problem(flags)
    ours = harness.run(example, STEPS)
    rows = reference.rollout(example, STEPS)
    assert rows.in_vocab_loss_mask.any((1, 2)).all()
    for k in range(STEPS):
        at = rows.loss_mask[k]
        assert harness.relative_error(ours.rows.loss[k][at], rows.loss[k][at]) < TOLERANCE
        np.testing.assert_array_equal(ours.rows.correct[k][at], rows.correct[k][at])
    total, gradients = reference.torch_total(example, STEPS)
    assert abs(total - reference.total_loss(rows)) < 1e-10 * total  # the reference with itself
    assert abs(ours.total - total) < TOLERANCE * total
    name, error = harness.worst_gradient(ours.gradients, gradients)
    assert error < TOLERANCE, name


@each_flag
def test_gradients_of_the_new_norms_equal_finite_differences(flags):
    example = problem(flags, seed=1)
    ours = harness.run(example, STEPS)
    names = [name for name in ours.gradients if name.startswith("fc_norm")] + ["norm.weight"]
    assert len(names) == (4 if "fc_norm" in flags else 1)
    rng = np.random.default_rng(0)
    size = 1e-5
    for name in names:
        direction = rng.normal(size=example.params[name].shape)

        def total(moved, name=name, direction=direction):
            params = example.params | {name: example.params[name] + moved * direction}
            rows = reference.rollout(dataclasses.replace(example, params=params), STEPS)
            return reference.total_loss(rows)

        expected = (total(size) - total(-size)) / (2 * size)
        gradient = ours.gradients[name]
        scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(gradient.size)
        assert abs(np.sum(gradient * direction) - expected) < TOLERANCE * scale, name


@each_flag
def test_each_flag_changes_what_is_trained(flags):
    example = problem(flags)
    plain = dataclasses.replace(example, head=problem(()).head)
    with_flags, without = (reference.rollout(each, STEPS).loss for each in (example, plain))
    assert abs(with_flags - without)[1:].max() > 0.01


# ------------------------------------------------------------------------------- export and import
@each_flag
def test_an_export_says_the_flags_and_comes_back(tmp_path, flags):
    folder, params, drafter = exported(tmp_path / "export", flags=flags)
    config = json.loads((folder / "config.json").read_text())
    for flag in ("fc_norm", "norm_output"):
        assert config.get(flag) is (True if flag in flags else None)
    names = {name for name in load_file(folder / SINGLE) if name.startswith("fc_norm")}
    expected = {f"fc_norm.{feature}.weight" for feature in range(3)}
    assert names == (expected if "fc_norm" in flags else set())
    head = load_head(folder, drafter, CAPTURED_LAYERS)
    assert jax.tree.structure(head.params) == jax.tree.structure(params)
    for ours, trained in zip(jax.tree.leaves(head.params), jax.tree.leaves(params), strict=True):
        rounded = trained.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(ours), rounded)


@each_flag
def test_the_twin_drafts_what_was_trained(tmp_path, flags):
    folder, params, drafter = exported(tmp_path / "export", flags=flags)
    report = check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)
    assert report.largest_difference < 1e-5
    for flag in flags:
        edit_config(folder, lambda config, flag=flag: config.pop(flag))
    differences = drafter.checkpoint_format.twin_differences(folder, params, drafter.dims, STEPS)
    assert max(differences.values()) > 1e-2
    with pytest.raises(ExportError, match=f"{flags[0]} is None, must be True"):
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)


def test_swapped_feature_norms_are_found(tmp_path):
    folder, params, drafter = exported(tmp_path / "export", flags=("fc_norm",))

    def swap(tensors):
        first, last = "fc_norm.0.weight", "fc_norm.2.weight"
        tensors[first], tensors[last] = tensors[last], tensors[first]

    edit_tensors(folder, swap)
    with pytest.raises(ExportError, match=r"fc_norm\.0\.weight: does not hold the trained numbers"):
        check_export(folder, params, drafter, vocabulary(), CAPTURED_LAYERS)


@each_flag
def test_a_head_with_other_flags_names_the_key_to_set(tmp_path, flags):
    folder, _, _ = exported(tmp_path / "export", flags=flags)
    with pytest.raises(CheckpointError) as error:
        load_head(folder, Eagle3(head_dims()), CAPTURED_LAYERS)
    for flag in flags:
        assert f"{flag}: the head has True, this run False; set draft_{flag}=True" in str(
            error.value
        )


@each_flag
def test_flags_of_a_speculators_folder_are_read(tmp_path, flags):
    folder, _, drafter = exported(tmp_path / "export", flags=flags)
    outside = ("draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "eagle_config", *flags)

    def nest(config):
        layer = {name: config.pop(name) for name in list(config) if name not in outside}
        layer.pop("architectures")
        config |= {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer,
        }

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    edit_config(folder, nest)
    edit_tensors(folder, rename)
    assert load_head(folder, drafter, CAPTURED_LAYERS).vocabulary.size == drafter.draft_vocab_size


@pytest.mark.parametrize("flag", ["norm_before_fc", "norm_before_residual"])
def test_norms_that_are_not_eagle_3_1_stay_refused(tmp_path, flag):
    folder, _, drafter = exported(tmp_path / "export", flags=("norm_output",))
    edit_config(folder, lambda config: config.update({flag: True}))
    with pytest.raises(CheckpointError, match=f"{flag}: is true, which this head does not compute"):
        load_head(folder, drafter, CAPTURED_LAYERS)


# ---------------------------------------------------------------------------------------- decoding
@each_flag
def test_decoding_drafts_what_the_twin_drafts(tmp_path, flags):
    folder, params, drafter = exported(tmp_path / "export", flags=flags)
    dims, rows, slots = drafter.dims, 6, 10
    params = jax.tree.map(lambda x: jnp.asarray(x.astype(ml_dtypes.bfloat16), jnp.float32), params)
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(rows + STEPS, dims.hidden_size)).astype(np.float32)
    features = rng.normal(size=(rows, 3 * dims.hidden_size)).astype(np.float32)
    places = np.arange(rows)
    visible = np.arange(slots) <= places[:, None]
    logits = []

    def choose(step, scores):  # the tokens are numbered as their embeddings
        logits.append(scores[0])
        return jnp.array([rows + 1 + step]), None

    @jax.jit
    def chain(params):
        cache = decoding.empty_cache(dims, 1, slots, jnp.float32)
        states, cache = decoding.absorb(
            params,
            dims,
            cache,
            jnp.asarray(embeddings[None, 1 : rows + 1]),
            jnp.asarray(features[None]),
            jnp.asarray(places[None]),
            jnp.asarray(places[None]),
            jnp.asarray(visible[None]),
        )
        decoding.draft(
            params,
            dims,
            cache,
            embed=lambda tokens: jnp.asarray(embeddings)[tokens],
            state=states[:, -1],
            token=jnp.array([rows]),
            slots=jnp.array([rows]),
            positions=jnp.array([rows]),
            visible=jnp.asarray(visible[-1:]),
            choose=choose,
            num_draft_tokens=STEPS,
        )
        return jnp.stack(logits)

    with jax.default_matmul_precision("highest"):
        ours = np.asarray(chain(params))
    expected = NumpyTwin(folder).logits(embeddings, features, places, STEPS)
    assert harness.relative_error(ours, expected) < 1e-4
