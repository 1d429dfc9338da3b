"""Seed-OSS: Llama with biases on q, k and v; its files always have head_dim."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.fields import field, require

MODEL_TYPES = ("seed_oss",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"seed_oss": {"attention_bias": True, "rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    field(config, "head_dim")
    require(config, mlp_bias=False)
    mixer = hf_config.attention(
        config,
        qkv_bias=field(config, "attention_bias"),
        output_bias=field(config, "attention_out_bias"),
    )
    layer = Layer(mixer, hf_config.mlp(config))
    return hf_config.decoder(config, [layer] * field(config, "num_hidden_layers"))
