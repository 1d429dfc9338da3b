"""Loading one parameter: every layout in which a checkpoint may hold it, under any sharding."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from MaxDraft.convert import loading
from MaxDraft.convert.loading import load_parameters
from MaxDraft.convert.safetensors_files import SINGLE, open_safetensors
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.layers.params import Param, Part, TensorLayout

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
