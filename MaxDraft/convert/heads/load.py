"""A draft head from a folder: our export, a published head, or a speculators (vLLM) folder.

The three differ in spelling only:
    tensors    midlayer.*, in a speculators folder layers.0.*; t2d and embed_tokens may be there
    config     flat, or the layer's part nested under transformer_layer_config
    captured   eagle_config's ids are outputs of layers, a top-level list is one higher
What computes something else (biases, more layers, other norms) is refused, not dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from MaxDraft.convert.differences import differences, listed
from MaxDraft.convert.loading import load_parameters
from MaxDraft.convert.safetensors_files import open_safetensors
from MaxDraft.convert.stored_tensor import CheckpointError, StoredTensor
from MaxDraft.convert.target.checkpoint import read_config
from MaxDraft.drafts.eagle3.dims import HeadDims, default_captured_layers
from MaxDraft.drafts.eagle3.drafter import Eagle3
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.drafts.vocabulary import DraftVocabulary, VocabularyError
from MaxDraft.layers.params import Tree, flatten
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import TargetError

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# The engines' default, which a head without rope_theta has been served with.
_ENGINES_THETA = 10000.0
# The target's own tensors that some trainers save along with the head.
_COPIES = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
_OTHER_MATHS = ("norm_before_residual", "norm_before_fc", "attention_bias", "mlp_bias")
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps")
# HeadDims field -> what config.json calls it
_FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "draft_vocab_size": "draft_vocab_size",
    "target_vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope": "rope",
}


@dataclasses.dataclass(frozen=True)
class LoadedHead:
    """A head from a folder. capture: outputs of which target layers it reads, 0-based; None: the
    folder does not say, which to every engine means the default layers of the target."""

    params: Tree  # float32, as head_params(dims) describes them
    vocabulary: DraftVocabulary
    dims: HeadDims
    capture: tuple[int, ...] | None


def warm_drafter(folder: Path, drafter: Eagle3) -> Eagle3:
    """The drafter with the rotary embedding and epsilon of the head in a folder, to go on from."""
    warm = load_head(Path(folder).expanduser()).dims
    dims = dataclasses.replace(drafter.dims, rope=warm.rope, norm_eps=warm.norm_eps)
    return dataclasses.replace(drafter, dims=dims)


def load_head(
    folder: Path,
    expected: HeadDims | None = None,
    capture: Sequence[int] | None = None,
    placement: Tree | None = None,  # tree of NamedSharding; None: one device
) -> LoadedHead:
    """Reads a head; one CheckpointError lists all that is damaged or differs from `expected`.

    expected, capture: what the head must fit; None: whatever the folder holds. To go on training a
    head that was made with another rope, ask with expected=None and take its `dims`.
    """
    folder = Path(folder)
    config = read_config(folder)
    nested = config.get("transformer_layer_config")
    layer = {**nested, "draft_vocab_size": config.get("draft_vocab_size")} if nested else config
    prefix = "layers.0." if nested else "midlayer."
    tensors = open_safetensors(folder)
    dims = _dims(folder, layer)
    problems = _unknown_maths(config, layer)
    table = jax.tree.map(
        lambda p: dataclasses.replace(p, tensor=p.tensor.replace("midlayer.", prefix)),
        head_params(dims),
    )
    problems += differences(tensors, table)
    used = {param.tensor for _, param in flatten(table)} | {"d2t", "t2d", *_COPIES}
    problems += [
        f"{name}: no such tensor in an EAGLE-3 head of one Llama layer; it computes something else"
        for name in sorted(tensors.keys() - used)
    ]
    vocabulary, unmapped = _vocabulary(tensors, dims)
    found_capture, contradiction = _capture(config)
    problems += [*unmapped, *contradiction]
    if expected is not None:
        problems += [
            f"{name}: the head has {getattr(dims, ours)}, this run {getattr(expected, ours)}"
            for ours, name in _FIELDS.items()
            if getattr(dims, ours) != getattr(expected, ours)
        ]
    if capture is not None and not contradiction:
        problems += _capture_differences(found_capture, tuple(capture))
    if problems or vocabulary is None:
        raise CheckpointError(f"the draft head in {folder} cannot be used:{listed(problems)}")
    params = load_parameters(folder, tensors, table, placement)
    return LoadedHead(params, vocabulary, dims, found_capture)


def _dims(folder: Path, layer: Mapping[str, Any]) -> HeadDims:
    missing = [field for field in _NEEDED if layer.get(field) is None]
    if missing:
        raise CheckpointError(f"config.json in {folder} has no {', '.join(missing)}")
    said = layer.get("rope_theta") is not None or layer.get("rope_parameters")
    try:
        rope = hf_config.rope(layer if said else {**layer, "rope_theta": _ENGINES_THETA})
        if hf_config.activation(layer) != "silu":
            raise TargetError(f"hidden_act '{layer['hidden_act']}': a head's is silu")
        if rope.rope_type == "longrope":
            raise TargetError("a head turns by no longrope: engines do not read it")
    except TargetError as error:
        raise CheckpointError(f"the draft head in {folder}: {error}") from error
    return HeadDims(
        hidden_size=layer["hidden_size"],
        intermediate_size=layer["intermediate_size"],
        num_heads=layer["num_attention_heads"],
        num_kv_heads=layer.get("num_key_value_heads") or layer["num_attention_heads"],
        head_dim=hf_config.head_dim(layer),
        draft_vocab_size=layer.get("draft_vocab_size") or layer["vocab_size"],
        target_vocab_size=layer["vocab_size"],
        norm_eps=layer["rms_norm_eps"],
        rope=rope,
    )


def _unknown_maths(config: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{field}: is true, which this head does not compute"
        for field in _OTHER_MATHS
        if config.get(field) or layer.get(field)
    ]
    if layer.get("num_hidden_layers", 1) != 1:
        problems.append(f"num_hidden_layers: is {layer['num_hidden_layers']}, must be 1")
    if config.get("quantization_config"):
        problems.append("quantization_config: take a head that is not quantized")
    return problems


def _vocabulary(
    tensors: Mapping[str, StoredTensor], dims: HeadDims
) -> tuple[DraftVocabulary | None, list[str]]:
    D, V = dims.draft_vocab_size, dims.target_vocab_size
    if "d2t" not in tensors:
        if D != V:
            return None, [f"d2t: missing, and the draft vocabulary is {D} of {V} tokens"]
        return DraftVocabulary(np.arange(V, dtype=np.int32), V), []
    wrong = [
        f"{name}: expected {[size]}, found {list(tensors[name].shape)}"
        for name, size in (("d2t", D), ("t2d", V))
        if name in tensors and tensors[name].shape != (size,)
    ]
    if wrong:
        return None, wrong
    t2d = tensors["t2d"].read() if "t2d" in tensors else None
    try:
        return DraftVocabulary.from_offsets(tensors["d2t"].read(), V, t2d), []
    except VocabularyError as error:
        return None, [str(error)]


def _capture(config: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, list[str]]:
    """Captured layers as outputs, and what contradicts itself about them."""
    outputs = (config.get("eagle_config") or {}).get(LAYER_IDS) or []
    inputs = config.get(LAYER_IDS) or []
    if outputs and inputs and [layer + 1 for layer in outputs] != list(inputs):
        where = "eagle_config's ids (outputs of layers) plus one"
        return None, [f"{LAYER_IDS}: {list(inputs)} at the top level is not {where}: {outputs}"]
    layers = tuple(outputs) or tuple(layer - 1 for layer in inputs)
    if layers and (len(layers) != 3 or min(layers) < 0):
        return None, [f"{LAYER_IDS}: {list(inputs or outputs)} are not three layers of a target"]
    return layers or None, []


def _capture_differences(found: tuple[int, ...] | None, wanted: tuple[int, ...]) -> list[str]:
    if found == wanted:
        return []
    if found is None:
        # The default depends on the target's depth only, and the last default layer tells that.
        if wanted == default_captured_layers(wanted[-1] + 4):
            return []
        found_text = "names none, which means the defaults"
    else:
        found_text = f"reads {list(found)}"
    return [
        f"captured layers: the head {found_text}, this run has {list(wanted)}; set target_layer_ids"
    ]
