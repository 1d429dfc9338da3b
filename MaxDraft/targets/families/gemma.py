"""Gemma 2 and 3, text: norms times 1 + weight, before and after; scaled embeddings; windows.

Gemma 2 caps scores and logits. Gemma 3 norms queries and keys, and its windowed layers turn heads
by a rotary embedding of their own.
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import Stored
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.hf_config import field

MODEL_TYPES = ("gemma2", "gemma3_text")
# What the published files leave out, as their reference code has it.
DEFAULTS = {
    "gemma2": {
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window_pattern": 6,
        "eos_token_id": 1,
    },
}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    every = field(config, "sliding_window_pattern", 2)
    unsaid = [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(field(config, "num_hidden_layers"))
    ]
    bias = field(config, "attention_bias", False)
    switches = {
        "qkv_bias": bias,
        "output_bias": bias,
        "scale": hf_config.number(config, "query_pre_attn_scalar") ** -0.5,
        "softcap": hf_config.number(config, "attn_logit_softcapping", 0.0),
        "qk_norm": "head" if config["model_type"] == "gemma3_text" else "",
    }
    mlp = hf_config.mlp(config)
    windows = hf_config.windows(config, unsaid)
    layers = [
        Layer(
            hf_config.attention(config, rope=_rope(config, window), window=window, **switches),
            mlp,
            post_norms=True,
        )
        for window in windows
    ]
    return hf_config.decoder(
        config,
        layers,
        norm_offset=1.0,
        embed_scale=field(config, "hidden_size") ** 0.5,
        logit_softcap=hf_config.number(config, "final_logit_softcapping", 0.0),
        names=(("mlp_norm", (Stored("pre_feedforward_layernorm.weight"),)),),
    )


def _rope(config: Mapping[str, Any], window: int) -> Rope:
    """Gemma 3 has two: nested by kind of layer, or `rope_local_base_freq` in older files."""
    if config["model_type"] == "gemma2":
        return hf_config.rope(config)
    nested = config.get("rope_parameters") or {}
    kind = "sliding_attention" if window else "full_attention"
    if kind in nested:
        own = {"rope_parameters": nested[kind]}
    elif window:
        own = {"rope_theta": config.get("rope_local_base_freq", 10_000.0)}
    else:
        own = {
            "rope_theta": config.get("rope_theta", 1_000_000.0),
            "rope_scaling": config.get("rope_scaling"),
        }
    return hf_config.rope({"head_dim": hf_config.head_dim(config), **own})
