"""config.json -> the family that reads it. A family is a file in families/."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from MaxDraft.targets import families
from MaxDraft.targets.dims import DecoderDims, TargetError
from MaxDraft.targets.fields import mapping, shown
from MaxDraft.targets.fields_read import NotedFields, check_fields_not_read, fields_not_read

_MAX_DEPTH = 16  # of objects and lists within each other; published files have four


def _families_by_model_type() -> dict[str, ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(families.__path__)]
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}


FAMILIES = _families_by_model_type()
_ROPE_FIELDS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def dims_from_config(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions of the target that a Hugging Face config.json describes.

    TargetError, and no other error, where the target is not one that this decoder computes as
    transformers does; the message names the field.
    """
    return _read_dims(NotedFields(text_config(config)))


def fields_left_out(config: Mapping[str, Any]) -> list[str]:
    """The fields of a config.json that have a value and that its family does not read.

    Bookkeeping, such as the type and version that a file was saved with, is not among them.
    """
    fields = NotedFields(text_config(config))
    _read_dims(fields)
    return fields_not_read(fields)


def _read_dims(config: NotedFields) -> DecoderDims:
    """dims_from_config of the language model's part; notes in it which fields are read."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise TargetError(
            f"config.json has model_type {shown(model_type)}; known families are {sorted(FAMILIES)}"
        )
    dims = FAMILIES[model_type].dims(config)
    check_fields_not_read(config)
    return dims


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json, with its family's defaults for absent fields.

    Multimodal checkpoints nest that part in `text_config`; the fields that only the outer part has,
    such as the quantization or the end-of-text tokens, hold for the language model too.
    """
    if not isinstance(config, Mapping):
        raise TargetError(f"config.json must be an object of fields, not {shown(config)}")
    _check_depth(config)
    inner = mapping(config, "text_config")
    fields = _with_outer_fields(config, inner) if inner else dict(config)
    model_type = fields.get("model_type")
    if not isinstance(model_type, str | None):
        raise TargetError(f"config.json: model_type must be text, not {shown(model_type)}")
    defaults = getattr(FAMILIES.get(model_type), "DEFAULTS", {}).get(model_type, {})
    nested = _thetas_in_rope(fields)
    return {name: value for name, value in defaults.items() if name not in nested} | fields


def _with_outer_fields(config: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """text_config with those fields of the outer part that it lacks or has as null."""
    for name in _ROPE_FIELDS:
        # transformers may have written a field beside rope_parameters, inside of it, or both.
        if config.get(name) is None:
            continue
        values = [inner.get(name), mapping(inner, "rope_parameters").get(name)]
        values = [value for value in values if value is not None] or [None]
        if any(value != config[name] for value in values):
            raise TargetError(
                f"config.json contradicts itself: {name} is {shown(config[name])}, and in "
                f"text_config, which holds, {shown(values[0])}"
            )
    outer = {
        key: value
        for key, value in config.items()
        if key == "quantization_config" or not isinstance(value, Mapping)
    }
    open_fields = {key for key, value in inner.items() if value is None and key in outer}
    return outer | {key: value for key, value in inner.items() if key not in open_fields}


def _thetas_in_rope(fields: Mapping[str, Any]) -> set[str]:
    """The thetas that stand inside of a rope object, which a default beside it would contradict.

    Where full and windowed layers have objects of their own, either may hold one.
    """
    names: set[str] = set()
    for spelling in ("rope_scaling", "rope_parameters"):
        rope = mapping(fields, spelling)
        names |= rope.keys() & {"rope_theta"}
        if any(isinstance(value, Mapping) for value in rope.values()):
            names |= {"rope_theta", "rope_local_base_freq"}
    return names


def _check_depth(config: Mapping[str, Any]) -> None:
    """TargetError where objects and lists are nested so deeply that comparing them would fail."""
    level: list[Any] = [config]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, Mapping | list | tuple)
            for child in (value.values() if isinstance(value, Mapping) else value)
        ]
    if level:
        raise TargetError(f"config.json: objects and lists are nested more than {_MAX_DEPTH} deep")
