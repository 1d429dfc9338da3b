"""Qwen3 (dense): an RMSNorm on every query and key head; its files always have head_dim."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.fields import field

MODEL_TYPES = ("qwen3",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"qwen3": {"rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    field(config, "head_dim")
    bias = field(config, "attention_bias")
    switches = {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head"}
    mlp = hf_config.mlp(config)
    return hf_config.decoder(
        config,
        [
            Layer(hf_config.attention(config, window=window, **switches), mlp)
            for window in hf_config.qwen_windows(config)
        ],
    )
