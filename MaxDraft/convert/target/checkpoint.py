"""The target's folder: config.json, weights, and a fingerprint that tells it from others."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from MaxDraft.convert.loading import load_parameters
from MaxDraft.convert.safetensors_files import open_safetensors, read_json
from MaxDraft.convert.stored_tensor import CheckpointError, StoredTensor
from MaxDraft.convert.target.mxfp4 import Mxfp4Tensor
from MaxDraft.convert.target.quantization import WeightTensor, check_packing, pair, part_names
from MaxDraft.convert.target.quantization_config import (
    DECLARATION_FILES,
    Quantization,
    quantization_of,
)
from MaxDraft.convert.tensor_layout import find_layout, tensor_names
from MaxDraft.layers.params import Tree, flatten

_EMBEDDING = "embed_tokens.weight"
# What multimodal checkpoints put for "model." before the language model's tensors.
_TEXT_SIDES = ("language_model.model.", "model.language_model.", "language_model.")
# Never weights: the rotary frequencies that old files carry along.
_NOT_WEIGHTS = "rotary_emb.inv_freq"
_SAMPLE = 256  # bytes of each tensor that enter the fingerprint
_TIED = 1 << 20  # bytes by which a tied head's second copy is compared


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; CheckpointError where it is missing or not JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    config = read_json(folder / "config.json", nan=True)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object of fields")
    return config


def read_quantization(folder: Path) -> Quantization | None:
    """How the weights of a model folder are quantized; None: they are not.

    CheckpointError for a format that cannot be read, and for declarations that differ.
    """
    folder = Path(folder)
    files = {
        name: read_json(folder / name) for name in DECLARATION_FILES if (folder / name).is_file()
    }
    # A folder of tensors alone has no config.json, and declares nothing.
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    return quantization_of(config, files)


def target_fingerprint(folder: Path) -> str:
    """sha256 that tells whether this is the target a run began with, in hexadecimal.

    Over config.json's fields, every tensor's name, dtype and shape, and 256 bytes from its middle:
    a fine-tuned copy has the same headers but not the same samples. The way the tensors are split
    into files does not matter, nor how config.json is laid out.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(read_config(folder), sort_keys=True).encode())
    tensors = open_safetensors(folder)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        digest.update(tensor.sample(_SAMPLE))
    return digest.hexdigest()


def open_weights(folder: Path) -> dict[str, WeightTensor]:
    """The target's tensors under the names of a plain language model; headers only are read.

    A multimodal checkpoint's language model is taken out of it, and a quantized tensor stands for
    what it means (quantization.py).
    """
    return _weights(Path(folder), open_safetensors(folder))


def _weights(folder: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, WeightTensor]:
    prefix = _text_prefix(tensors)
    renamed = {_plain_name(name, prefix): tensor for name, tensor in tensors.items()}
    quantization = read_quantization(folder)
    check_packing(folder, renamed, quantization)
    if quantization is None:
        return pair(renamed)
    return pair(renamed, quantization.block, quantization.in_blocks)


def _text_prefix(tensors: Mapping[str, Any]) -> str:
    """What stands in the files for the "model." of the language model's tensors."""
    for prefix in ("model.", *_TEXT_SIDES):
        if prefix + _EMBEDDING in tensors:
            return prefix
    return "model."


def _plain_name(name: str, prefix: str) -> str:
    if prefix == "model.":
        return name
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.removeprefix(prefix) if name.startswith(prefix) else name


def load_target(folder: Path, table: Tree, placement: Tree | None = None) -> Tree:
    """The target's parameters on their devices.

    table: decoder_params(...), or what keep_quantized makes of it. placement: tree of
    NamedSharding, None: one device. CheckpointError lists all missing and mis-shaped tensors at
    once.
    """
    tensors = open_weights(folder)
    names = _used(tensors, table)
    present = [name for name in names if name in tensors]
    bare = sorted(
        name for name in names if "model." in name and name.removeprefix("model.") in tensors
    )
    if bare and not any(name.startswith("model.") for name in present):
        raise CheckpointError(
            f"{folder} holds {bare[0].removeprefix('model.')!r} where {bare[0]!r} is expected: it "
            f"was saved without its language model head; save the whole ...ForCausalLM model"
        )
    copy, embedding = tensors.get("lm_head.weight"), tensors.get("model." + _EMBEDDING)
    # Some readers tie the head whatever the files hold, others take the files': no common truth.
    if (
        "lm_head.weight" not in names
        and isinstance(copy, StoredTensor)
        and isinstance(embedding, StoredTensor)
        and (copy.shape, copy.sample(_TIED)) != (embedding.shape, embedding.sample(_TIED))
    ):
        raise CheckpointError(
            f"config.json in {folder} ties the LM head to the embedding, but the files hold an "
            f"lm_head.weight that differs from it; set tie_word_embeddings to false there or "
            f"delete that tensor, whichever is right for this model"
        )
    return load_parameters(Path(folder), tensors, table, placement)


def _used(tensors: Mapping[str, WeightTensor], table: Tree) -> set[str]:
    """Names that the table reads, scales included."""
    used = set()
    for _, param in flatten(table):
        for name in tensor_names(param, find_layout(tensors, param)):
            used |= {name, *part_names(name, tensors)}
    return used


def unused_tensors(folder: Path, table: Tree) -> list[str]:
    """What of the files no parameter reads, and whether it is the text side of more.

    A line for every group of tensors, with their number. The second copy of a tied head and the
    rotary frequencies of old files are not counted.
    """
    stored = open_safetensors(folder)
    tensors = _weights(Path(folder), stored)
    used = _used(tensors, table) | {"lm_head.weight"}
    depth = 1 + max((max(param.layers) for _, param in flatten(table) if param.layers), default=-1)
    groups = collections.Counter(
        _group(name, depth)
        for name, tensor in tensors.items()
        if name not in used
        and not name.endswith(_NOT_WEIGHTS)
        and not isinstance(tensor, Mxfp4Tensor)  # its two parts are counted
    )
    prefix = _text_prefix(stored)
    side = [] if prefix == "model." else [f"only the language model, {prefix}*, is read"]
    return side + [
        f"{group}: {count:,} tensor{'s' if count > 1 else ''}"
        for group, count in sorted(groups.items())
    ]


def _group(name: str, depth: int) -> str:
    """Under what the tensor is listed that nothing reads."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= depth:
        return (
            f"model.layers.{layer[1]}.* (layer beyond the target's {depth}, multi-token prediction)"
        )
    scale = re.search(r"[._](input_scale(_ub)?|activation_scale|[qkv]_scale)$", name)
    if scale:
        return f"*.{scale[1]} (of activations, which are not quantized here)"
    if name.startswith(("model.layers.", "model.norm.", "model." + _EMBEDDING)):
        return re.sub(r"\.\d+(?=\.)", ".*", name)
    first, *rest = name.split(".")
    if first == "model" and len(rest) > 1:
        first, rest = f"model.{rest[0]}", rest[1:]
    return f"{first}.*" if rest else first


def target_memory(table: Tree) -> int:
    """Bytes of the target in memory, over all devices that do not hold copies.

    Of decoder_params(...): dequantized on load; of keep_quantized(...): kept.
    """
    return sum(
        math.prod(param.full_shape) * np.dtype(param.dtype).itemsize for _, param in flatten(table)
    )
