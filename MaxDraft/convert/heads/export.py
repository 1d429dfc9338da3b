"""The draft head as one folder that every serving engine reads: model.safetensors, config.json.

Tensors carry the published names, bf16, [out, in]. `d2t` holds OFFSETS, target id minus draft id:
engines add it without looking, and absolute ids would serve at an accept length of exactly 1.
config.json says the same thing in each engine's own spelling: old and new rope, and the captured
layers twice, as outputs (SGLang adds one itself) and as inputs of the next layer (vLLM).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from MaxDraft import storage
from MaxDraft.convert.safetensors_files import SINGLE
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.drafts.eagle3.dims import HeadDims
from MaxDraft.drafts.eagle3.head import head_params
from MaxDraft.drafts.vocabulary import DraftVocabulary
from MaxDraft.layers.params import Tree, flatten
from MaxDraft.layers.rope import Rope

ARCHITECTURE = "LlamaForCausalLMEagle3"
FILES = (SINGLE, "config.json")


def rope_fields(rope: Rope) -> tuple[float, dict[str, Any] | None, dict[str, Any]]:
    """-> rope_theta, rope_scaling (None: no scaling), rope_parameters.

    The inverse of targets/hf_config.rope: either spelling alone reads back as `rope`.
    """
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.rope_type == "yarn":
        scaling["beta_fast"] = rope.beta_fast
        scaling["beta_slow"] = rope.beta_slow
        # Engines spell these two differently, so they are written only where they say something.
        if not rope.truncate:
            scaling["truncate"] = False
        usual = 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
        if rope.attention_scaling != usual:
            scaling["attention_factor"] = rope.attention_scaling
    parameters = {"rope_theta": rope.theta, **scaling}
    return rope.theta, (None if rope.rope_type == "default" else scaling), parameters


def head_config(
    dims: HeadDims, target_config: Mapping[str, Any], capture: Sequence[int], target_name: str
) -> dict[str, Any]:
    """config.json of an exported head."""
    theta, scaling, parameters = rope_fields(dims.rope)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.target_vocab_size,
        "draft_vocab_size": dims.draft_vocab_size,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "max_position_embeddings": target_config["max_position_embeddings"],
        "rms_norm_eps": dims.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": target_config.get("bos_token_id"),
        "eos_token_id": target_config.get("eos_token_id"),
        "pad_token_id": target_config.get("pad_token_id"),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(capture),
            "use_aux_hidden_state": True,
        },
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in capture],
        "target_model": target_name,
    }


def head_tensors(
    params: Tree, dims: HeadDims, vocabulary: DraftVocabulary
) -> dict[str, np.ndarray]:
    """The tensors as stored: bf16 [out, in], d2t int64 [D], t2d bool [V].

    CheckpointError for a parameter of another shape, or one that is not finite.
    """
    D, V = vocabulary.size, vocabulary.target_vocab_size
    if (dims.draft_vocab_size, dims.target_vocab_size) != (D, V):
        raise CheckpointError(
            f"the draft vocabulary has {D} of {V} tokens, the head "
            f"{dims.draft_vocab_size} of {dims.target_vocab_size}"
        )
    tensors = {}
    values = jax.tree.leaves(params)
    table = head_params(dims)
    if jax.tree.structure(params) != jax.tree.structure(table):
        raise CheckpointError("the parameters to export are not those of an EAGLE-3 head")
    for (_, param), value in zip(flatten(table), values, strict=True):
        host = _on_host(value, param.tensor)
        if host.shape != param.shape:
            raise CheckpointError(
                f"{param.tensor}: expected {list(param.shape)} ([in, out]), has {list(host.shape)}"
            )
        if not np.isfinite(host).all():
            raise CheckpointError(
                f"{param.tensor} holds numbers that are not finite; export an earlier checkpoint"
            )
        stored = host.T if param.transposed else host
        tensors[param.tensor] = np.ascontiguousarray(stored.astype(ml_dtypes.bfloat16))
    tensors["d2t"] = np.ascontiguousarray(vocabulary.d2t, dtype=np.int64)
    tensors["t2d"] = np.ascontiguousarray(vocabulary.t2d, dtype=np.bool_)
    return tensors


def export_head(
    folder: Path,
    params: Tree,
    dims: HeadDims,
    vocabulary: DraftVocabulary,
    target_config: Mapping[str, Any],
    capture: Sequence[int],
    target_name: str,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Writes the head's folder and returns its path.

    Everything is written beside `folder` first, given to `check` (e.g. engine_check.check_export),
    and renamed when it is whole: an earlier export stays until then. A folder that holds anything
    but an export is never replaced.
    """
    folder = Path(folder).resolve()
    may_be_replaced(folder)
    for field, ours in (("vocab_size", dims.target_vocab_size), ("hidden_size", dims.hidden_size)):
        if target_config.get(field) != ours:
            raise CheckpointError(
                f"{field}: the head has {ours}, the target's config.json "
                f"{target_config.get(field)!r}; this head was not trained for this target"
            )
    tensors = head_tensors(params, dims, vocabulary)
    config = head_config(dims, target_config, capture, target_name)
    storage.remove_abandoned(folder.parent)
    with storage.fresh_folder(folder) as fresh:
        save_file(tensors, fresh / SINGLE, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (fresh / "config.json").write_text(text, encoding="utf-8")
        if check is not None:
            check(fresh)
        storage.replace_folder(fresh, folder)
    return folder


def _on_host(value: Any, name: str) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        raise CheckpointError(
            f"{name} is spread over several hosts; export from the run's checkpoint in one process"
        )
    return np.asarray(value, dtype=np.float32)


def may_be_replaced(folder: Path) -> None:
    """CheckpointError where something stands in `folder` that no export wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give export_path a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    names = [path.name for path in folder.iterdir()]
    if others or (names and not _is_export(folder)):
        raise CheckpointError(
            f"{folder} holds {', '.join((others or sorted(names))[:5])}, which no export wrote, "
            f"and is not replaced; move that away or give another export_path"
        )


def _is_export(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ARCHITECTURE in (config.get("architectures") or ())
