"""Reads the parts of a Hugging Face config.json that several families share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from MaxDraft.targets.dims import (
    MLA,
    Attention,
    DecoderDims,
    Experts,
    Layer,
    Mlp,
    TargetError,
)
from MaxDraft.targets.fields import default, field, head_dim, listed, shown
from MaxDraft.targets.hf_rope import mla_score_factor, rope

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def activation(config: Mapping[str, Any], name: str = "hidden_act") -> str:
    """The MLP's activation in field `name`; TargetError for one that this decoder does not know."""
    value = config.get(name)
    value = default(name) if value is None else value
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise TargetError(
            f"config.json: {name} {shown(value)} is not known; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[value]


def decoder(config: Mapping[str, Any], layers: Sequence[Layer], **switches: Any) -> DecoderDims:
    """The dimensions that every family reads in the same way, around its layers."""
    for part in dict.fromkeys(layer.feed_forward for layer in layers):
        if isinstance(part, Experts):
            _check_routing(part)
    return DecoderDims(
        **{
            "vocab_size": field(config, "vocab_size"),
            "hidden_size": field(config, "hidden_size"),
            "norm_eps": field(config, "rms_norm_eps"),
            "max_length": min([field(config, "max_position_embeddings"), *_rope_ends(layers)]),
            "layers": tuple(layers),
            "tied_head": field(config, "tie_word_embeddings"),
        }
        | switches
    )


def _rope_ends(layers: Sequence[Layer]) -> list[int]:
    """Positions up to which the rotary embeddings hold: longrope has other factors beyond."""
    ropes = [getattr(layer.mixer, "rope", None) for layer in layers]
    return [
        rope.original_max_position_embeddings
        for rope in ropes
        if rope and rope.rope_type == "longrope"
    ]


def _check_routing(experts: Experts) -> None:
    E, router = experts.num_experts, experts.router
    if not 1 <= router.top_k <= E:
        raise TargetError(f"config.json: a token cannot choose {router.top_k} of {E} experts")
    if E % router.n_group or not 1 <= router.topk_group <= router.n_group:
        raise TargetError(
            f"config.json: {E} experts cannot be chosen from the best {router.topk_group} of "
            f"{router.n_group} groups"
        )
    size = E // router.n_group
    if router.n_group > 1 and router.top_k > router.topk_group * size:
        raise TargetError(
            f"config.json: a token cannot choose {router.top_k} experts from {router.topk_group} "
            f"groups of {size}"
        )
    if router.group_score == "top2" and size < 2:
        raise TargetError(
            f"config.json: n_group {router.n_group} leaves {size} of {E} experts in a group, whose "
            f"score is the sum of its best two"
        )


def layer_numbers(config: Mapping[str, Any], name: str) -> Sequence[int] | None:
    """The layers that field `name` lists, None where it is absent; TargetError for no layer's."""
    numbers, count = listed(config, name), field(config, "num_hidden_layers")
    if numbers is None:
        return None
    if any(type(layer) is not int or layer not in range(count) for layer in numbers):
        raise TargetError(
            f"config.json: {name} must list layers from 0 to {count - 1}: {shown(numbers)}"
        )
    return numbers


def attention(config: Mapping[str, Any], **switches: Any) -> Attention:
    """Softmax attention with the fields that all families have; `switches` are the family's."""
    heads = field(config, "num_attention_heads")
    kv_heads = field(config, "num_key_value_heads", absent=heads)
    if heads % kv_heads:
        raise TargetError(
            f"config.json: {heads} num_attention_heads cannot share {kv_heads} num_key_value_heads"
        )
    return Attention(
        **{
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim(config),
            "rope": None if "rope" in switches else rope(config),
        }
        | switches
    )


def mla(config: Mapping[str, Any]) -> MLA:
    """DeepSeek's multi-head latent attention."""
    nope, rotated = field(config, "qk_nope_head_dim"), field(config, "qk_rope_head_dim")
    return MLA(
        num_heads=field(config, "num_attention_heads"),
        q_lora_rank=field(config, "q_lora_rank"),
        kv_lora_rank=field(config, "kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotated,
        v_head_dim=field(config, "v_head_dim"),
        rope=rope(config, size=rotated, interleaved=field(config, "rope_interleave")),
        scale=(nope + rotated) ** -0.5 * mla_score_factor(config) ** 2,
        bias=field(config, "attention_bias"),
    )


def mlp(config: Mapping[str, Any], size: str = "intermediate_size", act: str = "hidden_act") -> Mlp:
    """The dense MLP whose width stands in field `size`, its activation in `act`."""
    return Mlp(field(config, size), activation(config, act))


def layer_kinds(
    config: Mapping[str, Any],
    known: Collection[str],
    absent: Sequence[str] = (),
    name: str = "layer_types",
) -> Sequence[str]:
    """The kind of every layer, one of `known`, in field `name`; `absent` where there is none."""
    kinds = listed(config, name) or absent
    if not kinds:
        raise TargetError(
            f"config.json: {name} must list the kind of every layer, not {shown(kinds)}"
        )
    if len(kinds) != field(config, "num_hidden_layers"):
        raise TargetError(
            f"config.json: {name} has the kinds of {len(kinds)} layers, num_hidden_layers is "
            f"{config['num_hidden_layers']}"
        )
    unknown = [kind for kind in kinds if kind not in list(known)]
    if unknown:
        raise TargetError(f"config.json: {name} has the unknown kind {shown(unknown[0])}")
    return kinds


def windows(config: Mapping[str, Any], absent: Sequence[str] = ()) -> list[int]:
    """The window of every layer by `layer_types`; 0: the layer sees everything."""
    kinds = layer_kinds(config, ("full_attention", "sliding_attention"), absent)
    # Files without windows may have any size, as 0, which is none.
    size = field(config, "sliding_window") if "sliding_attention" in kinds else 0
    if "sliding_attention" in kinds and not size:
        raise TargetError(
            "config.json has layers of sliding_attention, and no field 'sliding_window'"
        )
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def qwen_windows(config: Mapping[str, Any]) -> list[int]:
    """The same where `use_sliding_window` must agree; files may be from before `layer_types`."""
    used = field(config, "use_sliding_window")
    if not config.get("layer_types"):
        if used:
            raise TargetError(
                "config.json has use_sliding_window without layer_types: which layers have a "
                "window depends on the reader; save it again with transformers 5"
            )
        return [0] * field(config, "num_hidden_layers")
    sizes = windows(config)
    if any(sizes) and not used:
        raise TargetError(
            "config.json contradicts itself: layer_types has sliding_attention, and "
            "use_sliding_window is not true"
        )
    return sizes
