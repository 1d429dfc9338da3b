"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their config (model_type llama)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.fields import field

MODEL_TYPES = ("llama",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"llama": {"rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    bias = field(config, "attention_bias")
    mixer = hf_config.attention(config, qkv_bias=bias, output_bias=bias)
    mlp_bias = field(config, "mlp_bias")
    mlp = dataclasses.replace(hf_config.mlp(config), bias=mlp_bias)
    return hf_config.decoder(config, [Layer(mixer, mlp)] * field(config, "num_hidden_layers"))
