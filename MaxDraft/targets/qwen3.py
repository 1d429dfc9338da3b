"""Qwen3 (dense): Llama with an RMSNorm on every query and key head; head_dim is always given."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config, llama
from MaxDraft.targets.decoder import DecoderDims

MODEL_TYPE = "qwen3"


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    hf_config.refuse_sliding_window(config)
    hf_config.field(config, "head_dim")
    return dataclasses.replace(llama.dims(config), qk_norm=True, mlp_bias=False)
