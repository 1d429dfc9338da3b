"""Gemma 2 and 3, text: norms times 1 + weight, before and after; scaled embeddings; windows.

Gemma 2 caps scores and logits. Gemma 3 norms queries and keys, and its windowed layers turn heads
by a rotary embedding of their own.
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import TensorLayout
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer, TargetError
from MaxDraft.targets.fields import field, flag, mapping, number, require

MODEL_TYPES = ("gemma2", "gemma3_text")
# What the published files leave out, as their reference code has it.
DEFAULTS = {
    "gemma2": {
        "rope_theta": 10_000.0,
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
        "eos_token_id": 1,
    },
}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    require(config, use_bidirectional_attention=False)
    if config["model_type"] == "gemma2":
        require(config, sliding_window_pattern=2)
    else:  # transformers reads no cap of the scores, others may
        require(config, attn_logit_softcapping=None)
    every = field(config, "sliding_window_pattern", 2 if config["model_type"] == "gemma2" else 6)
    unsaid = [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(field(config, "num_hidden_layers"))
    ]
    bias = flag(config, "attention_bias", False)
    switches = {
        "qkv_bias": bias,
        "output_bias": bias,
        "scale": number(config, "query_pre_attn_scalar") ** -0.5,
        "softcap": number(config, "attn_logit_softcapping", 0.0),
        "qk_norm": "head" if config["model_type"] == "gemma3_text" else "",
    }
    mlp = hf_config.mlp(config, act="hidden_activation")
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
        logit_softcap=number(config, "final_logit_softcapping", 0.0),
        names=(("mlp_norm", (TensorLayout("pre_feedforward_layernorm.weight"),)),),
    )


def _rope(config: Mapping[str, Any], window: int) -> Rope:
    """Gemma 3 has two: nested by kind of layer, or `rope_local_base_freq` in older files."""
    if config["model_type"] == "gemma2":
        return hf_config.rope(config)
    nested = mapping(config, "rope_parameters")
    if nested.keys() - {"sliding_attention", "full_attention"}:
        raise TargetError(
            f"config.json: rope_parameters {dict(nested)} must say it of sliding_attention and "
            f"full_attention apart"
        )
    rest = ("head_dim", "max_position_embeddings", "partial_rotary_factor")
    own = {name: config.get(name) for name in rest}
    if window:
        kind, theta, unsaid = "sliding_attention", "rope_local_base_freq", 10_000.0
    else:
        kind, theta, unsaid = "full_attention", "rope_theta", 1_000_000.0
        own["rope_scaling"] = config.get("rope_scaling")
    said = mapping(nested, kind)
    own["rope_theta"] = (
        said.get("rope_theta", unsaid) if config.get(theta) is None else config[theta]
    )
    if said.get("rope_theta", own["rope_theta"]) != own["rope_theta"]:
        raise TargetError(
            f"config.json contradicts itself: {theta} is {config[theta]!r}, and in rope_parameters "
            f"{said['rope_theta']!r}"
        )
    rope = hf_config.rope(own | {"rope_parameters": said})
    if not rope.truncate:  # transformers does not look for it inside of a kind
        raise TargetError("config.json: truncate False is not known for gemma3_text, only True")
    return rope
