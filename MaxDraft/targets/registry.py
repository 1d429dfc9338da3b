"""config.json -> the family that can run it."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import llama, qwen2, qwen3
from MaxDraft.targets.decoder import DecoderDims, TargetError

FAMILIES = {family.MODEL_TYPE: family for family in (llama, qwen2, qwen3)}


def dims_from_config(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions of the target described by a Hugging Face config.json."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise TargetError(
            f"config.json has model_type '{model_type}'; known families are {sorted(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise TargetError("config.json has a quantization_config; take an unquantised checkpoint")
    return FAMILIES[model_type].dims(config)
