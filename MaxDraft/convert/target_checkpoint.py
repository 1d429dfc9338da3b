"""The target's folder: config.json, weights, and a fingerprint that tells it from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from MaxDraft.convert.loading import listed, load_parameters, tensor_names
from MaxDraft.convert.safetensors_files import CheckpointError, open_safetensors, read_json
from MaxDraft.layers.params import Tree, flatten

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# What a field that config.json leaves out means there.
_UNSAID = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
}
_UNSAID_ROPE = {"rope_type": "default", "beta_fast": 32, "beta_slow": 1, "truncate": True}
# Never weights: the rotary frequencies that old files carry along.
_NOT_WEIGHTS = "rotary_emb.inv_freq"
_SAMPLE = 256  # bytes of each tensor that enter the fingerprint
_TIED = 1 << 20  # bytes by which a tied head's second copy is compared


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; CheckpointError where it is missing or not JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} is not a JSON object of fields")
    return config


def check_target_config(
    expected: Mapping[str, Any], config: Mapping[str, Any], model_file: str
) -> None:
    """One CheckpointError that names each field in which config.json differs from a model YAML.

    expected: the `target_config` of `model_file`. Both spellings of rope are compared by what they
    say, and a field that config.json leaves out by what that means.
    """
    lines = []
    for field in expected:
        if field in ROPE_FIELDS:
            continue
        found = _effective(config, field)
        wanted = expected[field]
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted  # a frozen YAML list
        if found != wanted:
            lines.append(_line(field, wanted, found))
    lines += _rope_differences(expected, config)
    if lines:
        raise CheckpointError(
            f"the target is not the one that {model_file} was written for:{listed(lines)}\n"
            f"Give another model_name or target_path"
        )


def _effective(config: Mapping[str, Any], field: str) -> Any:
    if config.get(field) is not None:
        return config[field]
    if field == "num_key_value_heads":
        return config.get("num_attention_heads")
    if field == "head_dim" and config.get("hidden_size") and config.get("num_attention_heads"):
        return config["hidden_size"] // config["num_attention_heads"]
    return _UNSAID.get(field)


def _line(field: str, expected: Any, found: Any) -> str:
    there = "does not have it" if found is None else f"has {found!r}"
    return f"{field}: the model file has {expected!r}, config.json {there}"


def _rope_differences(expected: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    wanted, found = _rope(expected), _rope(config)
    if not any(field in expected for field in ROPE_FIELDS):
        return []
    fields = wanted.keys() | found.keys()
    if "rope_scaling" not in expected and "rope_parameters" not in expected:
        fields = {"rope_theta"}  # the model file is silent about the scaling
    if "rope_theta" not in wanted:
        fields = fields - {"rope_theta"}
    values = {
        field: tuple(rope.get(field, _UNSAID_ROPE.get(field)) for rope in (wanted, found))
        for field in sorted(fields)
    }
    return [_line(field, a, b) for field, (a, b) in values.items() if a != b]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of rope as one flat dict, without nulls."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if "type" in said:  # the spelling before rope_type
        said.setdefault("rope_type", said["type"])
        del said["type"]
    if config.get("rope_theta") is not None:
        said.setdefault("rope_theta", config["rope_theta"])
    return {field: value for field, value in said.items() if value is not None}


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


def load_target(folder: Path, table: Tree, placement: Tree | None = None) -> Tree:
    """The target's parameters on their devices.

    table: decoder_params(...). placement: tree of NamedSharding, None: one device.
    CheckpointError lists all missing and mis-shaped tensors at once.
    """
    tensors = open_safetensors(folder)
    names = [name for _, param in flatten(table) for name in tensor_names(param)]
    found = [name for name in names if name in tensors]
    bare = [name for name in names if name.removeprefix("model.") in tensors]
    if not any(name.startswith("model.") for name in found) and any(
        name.startswith("model.") for name in bare
    ):
        raise CheckpointError(
            f"{folder} holds {bare[0].removeprefix('model.')!r} where {bare[0]!r} is expected: it "
            f"was saved without its language model head; save the whole ...ForCausalLM model"
        )
    copy, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    # Some readers tie the head whatever the files hold, others take the files': no common truth.
    if (
        "lm_head.weight" not in names
        and copy
        and embedding
        and (copy.shape, copy.sample(_TIED)) != (embedding.shape, embedding.sample(_TIED))
    ):
        raise CheckpointError(
            f"config.json in {folder} ties the LM head to the embedding, but the files hold an "
            f"lm_head.weight that differs from it; set tie_word_embeddings to false there or "
            f"delete that tensor, whichever is right for this model"
        )
    return load_parameters(Path(folder), tensors, table, placement)


def unused_tensors(folder: Path, table: Tree) -> list[str]:
    """Names in the files that no parameter reads, sorted.

    The second copy of a tied head and the rotary frequencies of old files are not counted.
    """
    used = {name for _, param in flatten(table) for name in tensor_names(param)}
    return sorted(
        name
        for name in open_safetensors(folder)
        if name not in used | {"lm_head.weight"} and not name.endswith(_NOT_WEIGHTS)
    )
