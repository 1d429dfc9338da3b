"""Seed-OSS: Llama with biases on q, k and v; head_dim is always given."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer, TargetError

MODEL_TYPES = ("seed_oss",)


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    hf_config.field(config, "head_dim")
    if config.get("mlp_bias"):
        raise TargetError("config.json: seed_oss with mlp_bias is not known")
    mixer = hf_config.attention(
        config,
        qkv_bias=hf_config.field(config, "attention_bias"),
        output_bias=config.get("attention_out_bias", False),
    )
    layer = Layer(mixer, hf_config.mlp(config))
    return hf_config.decoder(config, [layer] * hf_config.field(config, "num_hidden_layers"))
