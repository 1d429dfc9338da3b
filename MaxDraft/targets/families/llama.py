"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their config (model_type llama)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer

MODEL_TYPES = ("llama",)


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    bias = hf_config.field(config, "attention_bias", False)
    mixer = hf_config.attention(config, qkv_bias=bias, output_bias=bias)
    mlp_bias = hf_config.field(config, "mlp_bias", False)
    mlp = dataclasses.replace(hf_config.mlp(config), bias=mlp_bias)
    return hf_config.decoder(
        config, [Layer(mixer, mlp)] * hf_config.field(config, "num_hidden_layers")
    )
