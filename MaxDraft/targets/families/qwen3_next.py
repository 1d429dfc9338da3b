"""Qwen3-Next and Qwen3.5: three layers of gated delta rule, then one of gated attention.

A quarter of every head is rotated, norms multiply by 1 + weight, experts as in Qwen2-MoE (Qwen3.5
also has dense models).
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import Part, TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, DeltaNet, Layer, TargetError
from MaxDraft.targets.families import qwen_moe
from MaxDraft.targets.fields import field, require

MODEL_TYPES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {name: {"rope_theta": 10_000.0} for name in MODEL_TYPES}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    count = field(config, "num_hidden_layers")
    every = field(config, "full_attention_interval")
    kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    # In transformers the convolution has the same activation, here it is always silu.
    require(config, hidden_act="silu", attn_output_gate=True)
    k_heads, v_heads = (field(config, f"linear_num_{part}_heads") for part in ("key", "value"))
    if v_heads % k_heads:
        raise TargetError(
            f"config.json: {v_heads} linear_num_value_heads cannot share {k_heads} "
            f"linear_num_key_heads"
        )
    bias = field(config, "attention_bias")
    mixers = {
        "full_attention": hf_config.attention(
            config,
            rope=hf_config.rope(config, partial=0.25),
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="head",
            gated=True,
        ),
        "linear_attention": DeltaNet(
            num_k_heads=k_heads,
            num_v_heads=v_heads,
            k_dim=field(config, "linear_key_head_dim"),
            v_dim=field(config, "linear_value_head_dim"),
            conv_width=field(config, "linear_conv_kernel_dim"),
            fused=config["model_type"] == "qwen3_next",
        ),
    }
    kinds = hf_config.layer_kinds(config, mixers, absent=kinds)
    if config["model_type"] == "qwen3_5_text":
        feed_forwards = [hf_config.mlp(config)] * count
    elif config["model_type"] == "qwen3_5_moe_text":  # chosen weights always sum to one
        feed_forwards = [qwen_moe.experts(config | {"norm_topk_prob": True})] * count
    else:
        feed_forwards = qwen_moe.feed_forwards(config)
    layers = [Layer(mixers[kind], ff) for kind, ff in zip(kinds, feed_forwards, strict=True)]
    return hf_config.decoder(
        config, layers, norm_offset=1.0, names=(*qwen_moe.SHARED, *_names(config))
    )


def _names(config: Mapping[str, Any]) -> tuple[tuple[str, tuple[TensorLayout, ...]], ...]:
    """Qwen3.5's files hold all experts of a layer in one tensor."""
    if config["model_type"] != "qwen3_5_moe_text":
        return ()
    size, fused = field(config, "moe_intermediate_size"), "mlp.experts.gate_up_proj"
    one = "mlp.experts.{expert}."
    return (
        (
            "experts/gate",
            (
                TensorLayout(fused, True, Part(0, 2 * size)),
                TensorLayout(one + "gate_proj.weight", True),
            ),
        ),
        (
            "experts/up",
            (
                TensorLayout(fused, True, Part(size, 2 * size)),
                TensorLayout(one + "up_proj.weight", True),
            ),
        ),
        (
            "experts/down",
            (
                TensorLayout("mlp.experts.down_proj", True),
                TensorLayout(one + "down_proj.weight", True),
            ),
        ),
    )
