"""Reading a Hugging Face config.json: fields that must be there, and what families have in common.

Older files have `rope_theta` and `rope_scaling` at the top level, transformers 5 writes
`rope_parameters`. Both are read, a file that has both must say the same twice, and nothing falls
back to a silent default: wrong angles give wrong features without any error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import Attention, DecoderDims, LatentAttention, Layer, Mlp, TargetError

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_PLAIN_ROPE = {"rope_theta", "rope_type", "partial_rotary_factor"}
_IMAGES_ROPE = {"mrope_section", "mrope_interleaved"}  # text alone is turned as ever


def field(config: Mapping[str, Any], name: str) -> Any:
    """config[name]; TargetError naming the field where it is missing or null."""
    if config.get(name) is None:
        raise TargetError(f"the target's config.json has no field '{name}'")
    return config[name]


def head_dim(config: Mapping[str, Any]) -> int:
    """`head_dim` where the file has it, else hidden_size / num_attention_heads."""
    if config.get("head_dim"):
        return config["head_dim"]
    size, rest = divmod(field(config, "hidden_size"), field(config, "num_attention_heads"))
    if rest:
        raise TargetError(
            "config.json has no head_dim, and hidden_size is not a multiple of num_attention_heads"
        )
    return size


def activation(config: Mapping[str, Any]) -> str:
    """The MLP's activation; TargetError for one that this decoder does not know."""
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name not in ACTIVATIONS:
        raise TargetError(f"hidden_act '{name}' is not known; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def decoder(config: Mapping[str, Any], layers: Sequence[Layer], **switches: Any) -> DecoderDims:
    """What every family reads in the same way, around its layers."""
    return DecoderDims(
        **{
            "vocab_size": field(config, "vocab_size"),
            "hidden_size": field(config, "hidden_size"),
            "norm_eps": field(config, "rms_norm_eps"),
            "max_length": field(config, "max_position_embeddings"),
            "layers": tuple(layers),
            "tied_head": bool(config.get("tie_word_embeddings", False)),
        }
        | switches
    )


def attention(config: Mapping[str, Any], **switches: Any) -> Attention:
    """Softmax attention with the usual fields; `switches` are the family's."""
    return Attention(
        **{
            "num_heads": field(config, "num_attention_heads"),
            "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_dim": head_dim(config),
            "rope": None if "rope" in switches else rope(config),
        }
        | switches
    )


def latent_attention(config: Mapping[str, Any]) -> LatentAttention:
    """DeepSeek's attention: yarn's `mscale_all_dim` also sharpens the scores."""
    scaling = _scaling(config)
    nope_dim, rope_dim = field(config, "qk_nope_head_dim"), field(config, "qk_rope_head_dim")
    sharpening = 1.0
    if scaling.get("rope_type", "default") != "default" and scaling.get("mscale_all_dim"):
        sharpening = _mscale(_scaling_field(scaling, "factor"), scaling["mscale_all_dim"])
    return LatentAttention(
        num_heads=field(config, "num_attention_heads"),
        q_rank=config.get("q_lora_rank") or 0,
        kv_rank=field(config, "kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=field(config, "v_head_dim"),
        rope=rope(config, size=rope_dim, interleaved=config.get("rope_interleave", True)),
        scale=(nope_dim + rope_dim) ** -0.5 * sharpening**2,
        bias=config.get("attention_bias", False),
    )


def mlp(config: Mapping[str, Any], size: str = "intermediate_size") -> Mlp:
    """The dense MLP whose width stands in field `size`."""
    return Mlp(field(config, size), activation(config))


def kinds(
    config: Mapping[str, Any],
    known: Collection[str],
    unsaid: Sequence[str] = (),
    name: str = "layer_types",
) -> Sequence[str]:
    """The kind of every layer, one of `known`, in field `name`; `unsaid` where there is none."""
    found = config.get(name) or unsaid or field(config, name)
    if len(found) != field(config, "num_hidden_layers"):
        raise TargetError(
            f"config.json: {name} has the kinds of {len(found)} layers, num_hidden_layers is "
            f"{config['num_hidden_layers']}"
        )
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise TargetError(f"config.json: {name} has the unknown kind '{unknown[0]}'")
    return found


def windows(config: Mapping[str, Any], unsaid: Sequence[str] = ()) -> list[int]:
    """Window of every layer by `layer_types`, 0: it sees everything."""
    found = kinds(config, ("full_attention", "sliding_attention"), unsaid)
    return [field(config, "sliding_window") if kind == "sliding_attention" else 0 for kind in found]


def qwen_windows(config: Mapping[str, Any]) -> list[int]:
    """The same where files from before `layer_types` say `use_sliding_window`."""
    if config.get("layer_types"):
        return windows(config)
    if config.get("use_sliding_window"):
        raise TargetError(
            "config.json has use_sliding_window without layer_types: which layers have a window "
            "depends on the reader; save it again with transformers 5"
        )
    return [0] * field(config, "num_hidden_layers")


def rope(
    config: Mapping[str, Any],
    size: int | None = None,
    *,
    partial: float = 1.0,
    interleaved: bool = False,
) -> Rope:
    """Rotary embedding of heads of `size` dimensions; None: the usual head_dim.

    partial: the share of a head that is turned where the file does not say it.
    """
    scaling = _scaling(config)
    if "rope_theta" not in scaling:
        raise TargetError("config.json has neither 'rope_theta' nor 'rope_parameters.rope_theta'")
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or partial
    turned = int((size or head_dim(config)) * partial)
    return _with_scaling(scaling, turned, config, interleaved)


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings of rope as one dict; TargetError where they contradict each other."""
    old = dict(config.get("rope_scaling") or {})
    if config.get("rope_theta") is not None:
        old["rope_theta"] = config["rope_theta"]
    new = dict(config.get("rope_parameters") or {})
    for scaling in (old, new):
        for name in _IMAGES_ROPE:
            scaling.pop(name, None)
        if "type" in scaling:  # the spelling before rope_type
            if scaling.setdefault("rope_type", scaling["type"]) != scaling["type"]:
                raise TargetError(
                    f"config.json contradicts itself: rope type '{scaling['type']}' and rope_type "
                    f"'{scaling['rope_type']}'"
                )
            del scaling["type"]
        if scaling.keys() - _PLAIN_ROPE:
            _scaling_field(scaling, "rope_type")
    differing = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if differing:
        raise TargetError(
            f"config.json contradicts itself: rope_parameters and rope_theta/rope_scaling differ "
            f"in {differing}"
        )
    return {**old, **new}


def _with_scaling(
    scaling: Mapping[str, Any], size: int, config: Mapping[str, Any], interleaved: bool
) -> Rope:
    kind = {"su": "longrope"}.get(scaling.get("rope_type"), scaling.get("rope_type", "default"))
    common = {
        "theta": float(scaling["rope_theta"]),
        "head_dim": size,
        "kind": kind,
        "interleaved": interleaved,
    }
    if kind == "default":
        return Rope(**common)
    if kind == "longrope":
        return _longrope(scaling, size, config, common)
    if kind not in ("linear", "llama3", "yarn"):
        raise TargetError(
            f"rope scaling '{kind}' is not supported; known are default, linear, llama3, yarn and "
            f"longrope"
        )
    common["factor"] = float(_scaling_field(scaling, "factor"))
    if kind == "linear":
        return Rope(**common)
    common["original_length"] = int(_scaling_field(scaling, "original_max_position_embeddings"))
    if kind == "llama3":
        return Rope(
            **common,
            low_freq_factor=float(_scaling_field(scaling, "low_freq_factor")),
            high_freq_factor=float(_scaling_field(scaling, "high_freq_factor")),
        )
    return Rope(
        **common,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        truncate=bool(scaling.get("truncate", True)),
        cos_scale=_yarn_cos_scale(scaling, common["factor"]),
    )


def _scaling_field(scaling: Mapping[str, Any], name: str) -> Any:
    if scaling.get(name) is None:
        raise TargetError(f"config.json: the rope scaling {dict(scaling)} has no field '{name}'")
    return scaling[name]


def _longrope(
    scaling: Mapping[str, Any], size: int, config: Mapping[str, Any], common: dict[str, Any]
) -> Rope:
    """The short factors: those of sequences no longer than the original length, see max_length."""
    factors = tuple(float(factor) for factor in _scaling_field(scaling, "short_factor"))
    if len(factors) != size // 2:
        raise TargetError(
            f"config.json: the rope scaling has {len(factors)} short factors for {size // 2} pairs"
        )
    original = longrope_length(config)
    factor = scaling.get("factor") or field(config, "max_position_embeddings") / original
    cos_scale = scaling.get("attention_factor")
    if cos_scale is None:
        cos_scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(**common, factors=factors, cos_scale=float(cos_scale))


def longrope_length(config: Mapping[str, Any]) -> int:
    """Positions up to which longrope's short factors hold; all where there is no longrope."""
    scaling = _scaling(config)
    length = scaling.get("original_max_position_embeddings")
    if length is None:
        length = config.get("original_max_position_embeddings")
    if length is None or scaling.get("rope_type", "default") == "default":
        length = field(config, "max_position_embeddings")
    return int(length)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_cos_scale(scaling: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1, unless the file gives it or its two mscales (DeepSeek's form)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor, 1.0)
