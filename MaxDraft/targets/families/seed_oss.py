"""Seed-OSS: Llama with biases on q, k and v; head_dim is always given."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer

MODEL_TYPES = ("seed_oss",)


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    hf_config.field(config, "head_dim")
    hf_config.require(config, mlp_bias=False)
    mixer = hf_config.attention(
        config,
        qkv_bias=hf_config.field(config, "attention_bias"),
        output_bias=hf_config.field(config, "attention_out_bias", False),
    )
    layer = Layer(mixer, hf_config.mlp(config))
    return hf_config.decoder(config, [layer] * hf_config.field(config, "num_hidden_layers"))
