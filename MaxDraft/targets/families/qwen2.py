"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: biases on q, k and v."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer

MODEL_TYPES = ("qwen2",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"qwen2": {"rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    mlp = hf_config.mlp(config)
    return hf_config.decoder(
        config,
        [
            Layer(hf_config.attention(config, qkv_bias=True, window=window), mlp)
            for window in hf_config.qwen_windows(config)
        ],
    )
