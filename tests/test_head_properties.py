"""Whatever a head's config.json and tensors hold, loading it ends soon, in a head or our error."""

import json

import jax
import numpy as np
import pytest
from any_json import SETTINGS, mutated, only_user_errors
from head_helpers import CAPTURED_LAYERS, exported, vocabulary
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from MaxDraft.convert.heads.load import LoadedHead, load_head, open_head
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3.drafter import Eagle3


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """-> (folder, its config, its tensors, its drafter)."""
    flags = ("fc_norm", "norm_output")
    folder, _, drafter = exported(tmp_path_factory.mktemp("head") / "export", flags=flags)
    config = json.loads((folder / "config.json").read_text())
    return folder, config, load_file(folder / SINGLE), drafter


def nested(config):
    """The same fields as vLLM's speculators has them."""
    outside = ("draft_vocab_size", "eagle_config", "fc_norm", "norm_output")
    layer = {name: value for name, value in config.items() if name not in outside}
    layer.pop("architectures")
    outer = {name: config[name] for name in outside}
    return outer | {"architectures": ["Eagle3Speculator"], "transformer_layer_config": layer}


@SETTINGS
@given(data=st.data())
def test_any_config_is_a_head_or_our_error(head, data):
    folder, config, tensors, _ = head
    save_file(tensors, folder / SINGLE)
    shape = data.draw(st.sampled_from([config, nested(config)]))
    (folder / "config.json").write_text(json.dumps(data.draw(mutated(shape))))
    contents = only_user_errors(CheckpointError, open_head, folder, Eagle3)
    if contents is not None:  # whatever was read can be hashed, printed and saved
        dims = contents.drafter.dims
        assert hash(dims) == hash(dims)
        json.dumps(contents.drafter.saved_dims())
        assert dims.hidden_size > 0 and dims.norm_eps > 0


DTYPES = ("float32", "float16", "int64", "int32", "bool", "uint8")


@SETTINGS
@given(data=st.data())
def test_any_tensors_are_a_head_or_our_error(head, data):
    folder, config, tensors, drafter = head
    (folder / "config.json").write_text(json.dumps(config))
    tensors = dict(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    change = data.draw(st.sampled_from(["none", "gone", "renamed", "dtype", "shape", "values"]))
    if change == "renamed":
        name = data.draw(st.sampled_from(["layers.0.x", "d2t", "embed_tokens.weight", "", "fc"]))
    elif change == "dtype":
        tensor = tensor.astype(np.float32).astype(data.draw(st.sampled_from(DTYPES)))
    elif change == "shape":
        shapes = [(0,), (), (1, *tensor.shape), (tensor.size,), tensor.shape[::-1]]
        shape = data.draw(st.sampled_from(shapes))
        tensor = np.zeros(shape, tensor.dtype)
    elif change == "values" and tensor.dtype == np.int64:
        values = st.integers(-(2**63), 2**63 - 1)
        tensor = np.full(tensor.shape, data.draw(values), np.int64)
    elif change == "values":
        tensor = np.full(tensor.shape, np.nan).astype(tensor.dtype)
    if change != "gone":
        tensors[name] = np.ascontiguousarray(tensor)
    save_file(tensors, folder / SINGLE)
    loaded = only_user_errors(CheckpointError, load_head, folder, drafter, CAPTURED_LAYERS)
    if loaded is None:
        assert change != "none"
        return
    assert isinstance(loaded, LoadedHead)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded.params))
    assert loaded.vocabulary.size == vocabulary().size
