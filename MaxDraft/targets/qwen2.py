"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: Llama with biases on q, k and v."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config, llama
from MaxDraft.targets.decoder import DecoderDims

MODEL_TYPE = "qwen2"


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    hf_config.refuse_sliding_window(config)
    return dataclasses.replace(llama.dims(config), qkv_bias=True, output_bias=False, mlp_bias=False)
