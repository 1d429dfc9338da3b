"""Llama 4 Scout and Maverick, text: chunks with rotary embedding, each fourth layer without either.

Layers without rotary embedding see everything, and their queries grow with the position
(attn_temperature_tuning). The sigmoid of an expert's logit weights what goes into the expert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from MaxDraft.layers.params import Part, TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import Attention, DecoderDims, Experts, Layer, Router, TargetError
from MaxDraft.targets.fields import field, listed, shown

MODEL_TYPES = ("llama4_text",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {
    "llama4_text": {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "attn_temperature_tuning": True,
        "use_qk_norm": True,
        "rope_theta": 500_000.0,
    }
}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    count, size = field(config, "num_hidden_layers"), field(config, "intermediate_size")
    moe = Experts(
        num_experts=field(config, "num_local_experts"),
        intermediate_size=size,
        router=Router(field(config, "num_experts_per_tok"), "sigmoid"),
        activation=hf_config.activation(config),
        apply_router_weight_on_input=True,
        shared_intermediate_size=size,
    )
    mlp = hf_config.mlp(config, "intermediate_size_mlp")
    step = field(config, "interleave_moe_layer_step")
    sparse = hf_config.layer_numbers(config, "moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    every = field(config, "no_rope_layer_interval")
    # no_rope_layers has 1 for the layers that do have a rotary embedding.
    rotary = listed(config, "no_rope_layers") or [int((i + 1) % every > 0) for i in range(count)]
    if len(rotary) != count or any(value not in (0, 1) for value in rotary):
        raise TargetError(
            f"config.json: no_rope_layers must have 0 or 1 for each of {count} layers, not "
            f"{shown(rotary)}"
        )
    _check_kinds(config, rotary)
    mixers = {has_rope: _mixer(config, has_rope) for has_rope in {bool(i) for i in rotary}}
    return hf_config.decoder(
        config,
        [Layer(mixers[bool(rotary[i])], moe if i in sparse else mlp) for i in range(count)],
        names=_names(size),
    )


def _check_kinds(config: Mapping[str, Any], rotary: Sequence[int]) -> None:
    """TargetError where `layer_types` contradicts `no_rope_layers` and the chunk."""
    chunked = field(config, "attention_chunk_size") > 0
    expected = ["chunked_attention" if one and chunked else "full_attention" for one in rotary]
    kinds = hf_config.layer_kinds(config, ("chunked_attention", "full_attention"), expected)
    for i, (kind, other) in enumerate(zip(kinds, expected, strict=True)):
        if kind != other:
            raise TargetError(
                f"config.json contradicts itself: layer_types has {kind} for layer {i}, "
                f"no_rope_layers and attention_chunk_size make it {other}"
            )


def _attn_temperature_tuning(config: Mapping[str, Any]) -> bool:
    """Older files have 4 for true and 0 for false."""
    name = "attn_temperature_tuning"
    value = config.get(name)
    if type(value) is int and value >= 0:
        return value > 0
    return field(config, name)


def _mixer(config: Mapping[str, Any], has_rope: bool) -> Attention:
    bias = field(config, "attention_bias")
    tuning = None
    if _attn_temperature_tuning(config) and not has_rope:
        tuning = (field(config, "floor_scale"), field(config, "attn_scale"))
    return hf_config.attention(
        config,
        rope=hf_config.rope(config, interleaved=True) if has_rope else None,
        chunk=field(config, "attention_chunk_size") if has_rope else 0,
        qkv_bias=bias,
        output_bias=bias,
        l2_norm=has_rope and field(config, "use_qk_norm"),
        attn_temperature_tuning=tuning,
    )


def _names(size: int) -> tuple[tuple[str, tuple[TensorLayout, ...]], ...]:
    part, experts = "feed_forward.", "feed_forward.experts."
    fused = experts + "gate_up_proj"
    one = experts + "{expert}."  # as some quantized files have them
    return (
        *(
            (f"{path}/{name}", (TensorLayout(f"{part}{prefix}{name}_proj.weight", True),))
            for path, prefix in (("mlp", ""), ("experts/shared", "shared_expert."))
            for name in ("gate", "up", "down")
        ),
        ("experts/router", (TensorLayout(part + "router.weight", True),)),
        (
            "experts/gate",
            (
                TensorLayout(fused, part=Part(0, 2 * size)),
                TensorLayout(one + "gate_proj.weight", True),
            ),
        ),
        (
            "experts/up",
            (
                TensorLayout(fused, part=Part(size, 2 * size)),
                TensorLayout(one + "up_proj.weight", True),
            ),
        ),
        (
            "experts/down",
            (
                TensorLayout(experts + "down_proj"),
                TensorLayout(one + "down_proj.weight", True),
            ),
        ),
    )
