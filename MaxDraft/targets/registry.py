"""config.json -> the family that can run it. A family is a file in families/, found there."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from MaxDraft.targets import families
from MaxDraft.targets.dims import DecoderDims, TargetError


def _found() -> dict[str, ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(families.__path__)]
    modules = [importlib.import_module(f"{families.__name__}.{name}") for name in names]
    return {model_type: module for module in modules for model_type in module.MODEL_TYPES}


FAMILIES = _found()  # model_type -> its family's module


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of config.json, with what its family's files leave out.

    Multimodal checkpoints nest it in `text_config`; what only the outer part says, as the
    quantisation or the end-of-text tokens, holds for it too.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
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
    return getattr(FAMILIES.get(model_type), "DEFAULTS", {}).get(model_type, {}) | said


def dims_from_config(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions of the target described by a Hugging Face config.json."""
    config = text_config(config)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise TargetError(
            f"config.json has model_type '{model_type}'; known families are {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type].dims(config)
