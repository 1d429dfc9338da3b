"""Gemma 2 and 3, text: norms multiply by 1 + weight, before and after; scaled embeddings; windows.

Gemma 2 caps scores and logits. Gemma 3 normalizes queries and keys, and its windowed layers have a
rotary embedding of their own.
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import TensorLayout
from MaxDraft.layers.rope import Rope
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer, TargetError
from MaxDraft.targets.fields import field, mapping, require, shown

MODEL_TYPES = ("gemma2", "gemma3_text")
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {
    "gemma2": {
        "rope_theta": 10_000.0,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "rope_theta": 1_000_000.0,  # of the layers that see everything
        "rope_local_base_freq": 10_000.0,  # of the windowed layers
        "sliding_window_pattern": 6,
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
    every = field(config, "sliding_window_pattern")
    kinds = [
        "sliding_attention" if (i + 1) % every else "full_attention"
        for i in range(field(config, "num_hidden_layers"))
    ]
    bias = field(config, "attention_bias")
    switches = {
        "qkv_bias": bias,
        "output_bias": bias,
        "scale": field(config, "query_pre_attn_scalar") ** -0.5,
        "softcap": field(config, "attn_logit_softcapping"),
        "qk_norm": "head" if config["model_type"] == "gemma3_text" else "",
    }
    mlp = hf_config.mlp(config, act="hidden_activation")
    windows = hf_config.windows(config, absent=kinds)
    mixers = {
        window: hf_config.attention(config, rope=_rope(config, window), window=window, **switches)
        for window in set(windows)
    }
    layers = [Layer(mixers[window], mlp, post_norms=True) for window in windows]
    return hf_config.decoder(
        config,
        layers,
        norm_offset=1.0,
        embed_scale=field(config, "hidden_size") ** 0.5,
        logit_softcap=field(config, "final_logit_softcapping"),
        names=(("mlp_norm", (TensorLayout("pre_feedforward_layernorm.weight"),)),),
    )


def _rope(config: Mapping[str, Any], window: int) -> Rope:
    """Gemma 3 has two: nested by kind of layer, or `rope_local_base_freq` in older files."""
    if config["model_type"] == "gemma2":
        return hf_config.rope(config)
    by_kind = mapping(config, "rope_parameters")
    if by_kind.keys() - {"sliding_attention", "full_attention"}:
        raise TargetError(
            f"config.json: rope_parameters {shown(by_kind)} must have those of sliding_attention "
            f"and of full_attention apart"
        )
    others = ("head_dim", "max_position_embeddings", "partial_rotary_factor")
    own = {name: config.get(name) for name in others}
    if window:
        kind, theta_name = "sliding_attention", "rope_local_base_freq"
    else:
        kind, theta_name = "full_attention", "rope_theta"
        own["rope_scaling"] = config.get("rope_scaling")
    parameters = mapping(by_kind, kind)
    nested, beside = parameters.get("rope_theta"), config.get(theta_name)
    if None not in (nested, beside) and nested != beside:
        raise TargetError(
            f"config.json contradicts itself: {theta_name} is {shown(beside)}, and in "
            f"rope_parameters {shown(nested)}"
        )
    thetas = (beside, nested, DEFAULTS["gemma3_text"][theta_name])
    own["rope_theta"] = next(theta for theta in thetas if theta is not None)
    rope = hf_config.rope(own | {"rope_parameters": parameters})
    if not rope.truncate:  # transformers does not look for it inside of a kind
        raise TargetError("config.json: truncate False is not known for gemma3_text, only True")
    return rope
