"""config.json -> the family that can run it. A family is a file in families/, found there."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from MaxDraft.targets import families
from MaxDraft.targets.dims import DecoderDims, TargetError
from MaxDraft.targets.fields import mapping


def _found() -> dict[str, ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(families.__path__)]
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}


FAMILIES = _found()  # model_type -> its family's module
_ROPE = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json, with what its family's files leave out.

    Multimodal checkpoints nest it in `text_config`; what only the outer part says, as the
    quantization or the end-of-text tokens, holds for it too.
    """
    inner = mapping(config, "text_config")
    if inner:
        for name in _ROPE:
            if config.get(name) not in (None, inner.get(name)):
                raise TargetError(
                    f"config.json contradicts itself: {name} is {config[name]!r}, and in "
                    f"text_config, which holds, {inner.get(name)!r}"
                )
        outer = {
            key: value
            for key, value in config.items()
            if key == "quantization_config" or not isinstance(value, Mapping)
        }
        open_ = {key for key, value in inner.items() if value is None and key in outer}
        said = outer | {key: value for key, value in inner.items() if key not in open_}
    else:
        said = dict(config)
    model_type = said.get("model_type")
    if not isinstance(model_type, str | None):
        raise TargetError(f"config.json: model_type must be text, not {model_type!r}")
    unsaid = dict(getattr(FAMILIES.get(model_type), "DEFAULTS", {}).get(model_type, {}))
    ropes = [mapping(said, part) for part in ("rope_scaling", "rope_parameters")]
    if any("rope_theta" in rope for rope in ropes):
        unsaid.pop("rope_theta", None)
    return unsaid | said


def dims_from_config(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions of the target described by a Hugging Face config.json."""
    config = text_config(config)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise TargetError(
            f"config.json has model_type '{model_type}'; known families are {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type].dims(config)
