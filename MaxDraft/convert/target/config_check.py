"""config.json against the model file that a run names: two descriptions of one target.

They are compared by what they mean: a field that config.json leaves out, the two names that
transformers gave some fields, and every spelling of a rotary embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MaxDraft.convert.differences import listed
from MaxDraft.convert.stored_tensor import CheckpointError
from MaxDraft.targets.fields import default, shown
from MaxDraft.targets.model_file import agrees
from MaxDraft.targets.registry import text_config

ROPE_FIELDS = (
    "rope_theta",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
)
_SCALING_FIELDS = ("rope_scaling", "rope_parameters")
# Two names of one field, by the version of transformers that wrote it.
_SYNONYMS = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "hidden_act": "hidden_activation",
    "hidden_activation": "hidden_act",
}


def check_target_config(
    expected: Mapping[str, Any], config: Mapping[str, Any], model_file: str
) -> None:
    """One CheckpointError that names each field in which config.json differs from a model YAML.

    expected: the `target_config` of `model_file`. config: of the language model, in a multimodal
    checkpoint its text_config. All spellings of rope are compared by their values, and an absent
    field by what it means (targets/fields.py). A model file may list values of several releases.
    """
    config = text_config(config)
    lines = []
    for field, wanted in expected.items():
        value = _effective(config, field)
        if field not in ROPE_FIELDS and not agrees(field, wanted, value):
            lines.append(_line(field, wanted, value))
    lines += _rope_differences(expected, config)
    if lines:
        raise CheckpointError(
            f"the target is not the one that {model_file} was written for:{listed(lines)}\n"
            f"Give another model_name or target_path"
        )


def _effective(config: Mapping[str, Any], field: str) -> Any:
    """The value of a field, under either of its names; of an absent one, what that means."""
    for name in (field, _SYNONYMS.get(field)):
        if config.get(name) is not None:
            return config[name]
    if field == "num_key_value_heads":
        return config.get("num_attention_heads")
    hidden_size, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if field == "head_dim" and type(hidden_size) is int and type(heads) is int and heads > 0:
        return hidden_size // heads
    return default(field)


def _line(field: str, expected: Any, value: Any) -> str:
    expected = list(expected) if isinstance(expected, tuple) else expected  # a frozen YAML list
    there = "does not have it" if value is None else f"has {shown(value)}"
    return f"{field}: the model file has {expected!r}, config.json {there}"


def _rope_differences(expected: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    if not any(field in expected for field in ROPE_FIELDS):
        return []
    wanted, actual = _rope(expected), _rope(config)
    fields = wanted.keys() | actual.keys()
    if not any(field in expected for field in _SCALING_FIELDS):
        fields = wanted.keys()  # the model file is silent about the scaling
    fields = {field for field in fields if field in wanted or not field.endswith("rope_theta")}
    values = {
        field: tuple(rope.get(field, default(field.split(".")[-1])) for rope in (wanted, actual))
        for field in sorted(fields)
    }
    return [_line(field, a, b) for field, (a, b) in values.items() if not agrees(field, a, b)]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """All spellings of rope as one flat dict, without nulls.

    Where full and windowed layers have rotary embeddings of their own, the fields are
    full_attention.rope_theta, sliding_attention.rope_theta and so on.
    """
    outer = {
        field: config.get(field)
        for field in ("rope_theta", "partial_rotary_factor")
        if config.get(field) is not None
    }
    parameters = config.get("rope_parameters") or {}
    by_layer = {kind: rope for kind, rope in parameters.items() if isinstance(rope, Mapping)}
    if by_layer:
        ropes = {kind: _in_new_spelling(rope) for kind, rope in by_layer.items()}
    else:
        plain = _in_new_spelling(outer | dict(config.get("rope_scaling") or {}) | dict(parameters))
        if config.get("rope_local_base_freq") is None:
            return plain
        local = {"rope_theta": config["rope_local_base_freq"]}
        ropes = {"full_attention": plain, "sliding_attention": local}
    return {f"{kind}.{field}": value for kind in ropes for field, value in ropes[kind].items()}


def _in_new_spelling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a rope object that are not null; its type was once named "type"."""
    rope = {field: value for field, value in rope.items() if value is not None}
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    return rope
