"""Llama 4 Scout and Maverick, text: chunks with rotary embedding, each fourth layer without either.

Layers without rotary embedding see everything, and sharpen their queries with the position. Experts
are chosen by their logits' sigmoid, which weighs what goes into them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from MaxDraft.layers.params import Part, TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import Attention, DecoderDims, Experts, Layer, Router, TargetError
from MaxDraft.targets.fields import field, flag, listed, number

MODEL_TYPES = ("llama4_text",)
# What the published files leave out, as their reference code has it.
DEFAULTS = {
    "llama4_text": {
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
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
        weigh_input=True,
        shared_size=size,
    )
    mlp = hf_config.mlp(config, "intermediate_size_mlp")
    step = field(config, "interleave_moe_layer_step", 1)
    sparse = hf_config.layer_numbers(config, "moe_layers")
    sparse = range(step - 1, count, step) if sparse is None else sparse
    every = field(config, "no_rope_layer_interval", 4)
    turned = listed(config, "no_rope_layers") or [int((i + 1) % every > 0) for i in range(count)]
    if len(turned) != count or any(said not in (0, 1) for said in turned):
        raise TargetError(
            f"config.json: no_rope_layers must say 0 or 1 of {count} layers, not {turned!r}"
        )
    _check_kinds(config, turned)
    return hf_config.decoder(
        config,
        [Layer(_mixer(config, bool(turned[i])), moe if i in sparse else mlp) for i in range(count)],
        names=_names(size),
    )


def _check_kinds(config: Mapping[str, Any], turned: Sequence[int]) -> None:
    """TargetError where `layer_types` does not say what `no_rope_layers` and the chunk do."""
    chunked = field(config, "attention_chunk_size", 0) > 0
    expected = ["chunked_attention" if one and chunked else "full_attention" for one in turned]
    found = hf_config.kinds(config, ("chunked_attention", "full_attention"), expected)
    for i, (said, meant) in enumerate(zip(found, expected, strict=True)):
        if said != meant:
            raise TargetError(
                f"config.json contradicts itself: layer_types has {said} for layer {i}, "
                f"no_rope_layers and attention_chunk_size make it {meant}"
            )


def _tuned(config: Mapping[str, Any]) -> bool:
    """attn_temperature_tuning: older files say 4 for true."""
    name = "attn_temperature_tuning"
    if isinstance(config.get(name), bool | None):
        return flag(config, name, True)
    return field(config, name, least=0) > 0


def _mixer(config: Mapping[str, Any], turned: bool) -> Attention:
    bias = flag(config, "attention_bias", False)
    tempered = None
    if _tuned(config) and not turned:
        tempered = (number(config, "floor_scale"), number(config, "attn_scale"))
    return hf_config.attention(
        config,
        rope=hf_config.rope(config, interleaved=True) if turned else None,
        chunk=field(config, "attention_chunk_size", 0) if turned else 0,
        qkv_bias=bias,
        output_bias=bias,
        l2_norm=turned and flag(config, "use_qk_norm", True),
        tempered=tempered,
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
