"""Llama 2, 3, 3.1, 3.2, 3.3 and what shares their config (model_type llama)."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.decoder import DecoderDims
from MaxDraft.targets.hf_config import field

MODEL_TYPE = "llama"


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    hf_config.require_silu(config)
    return DecoderDims(
        vocab_size=field(config, "vocab_size"),
        hidden_size=field(config, "hidden_size"),
        intermediate_size=field(config, "intermediate_size"),
        num_layers=field(config, "num_hidden_layers"),
        num_heads=field(config, "num_attention_heads"),
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=hf_config.head_dim(config),
        norm_eps=field(config, "rms_norm_eps"),
        rope=hf_config.rope(config),
        max_length=field(config, "max_position_embeddings"),
        tied_head=config.get("tie_word_embeddings", False),
        qkv_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )
