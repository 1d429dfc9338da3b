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
from MaxDraft.targets.dims import (
    Attention,
    DecoderDims,
    Experts,
    LatentAttention,
    Layer,
    Mlp,
    TargetError,
)

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_PLAIN_ROPE = {"rope_theta", "rope_type", "partial_rotary_factor"}
_IMAGES_ROPE = {"mrope_section", "mrope_interleaved"}  # text alone is turned as ever


def field(
    config: Mapping[str, Any], name: str, unsaid: int | None = None, *, least: int = 1
) -> int:
    """config[name], a whole number of at least `least`, or true or false.

    Missing or null: `unsaid`. TargetError naming the field where there is no such, or where it is
    something else.
    """
    value = _said(config, name, unsaid)
    whole = isinstance(value, bool) or (isinstance(value, int) and value >= least)
    if not whole and value != unsaid:
        raise TargetError(
            f"config.json: {name} must be a whole number of {least} or more, not {value!r}"
        )
    return value


def number(config: Mapping[str, Any], name: str, unsaid: float | None = None) -> float:
    """config[name], a positive number, in the way of `field`."""
    value = _said(config, name, unsaid)
    positive = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    if not positive and value != unsaid:
        raise TargetError(f"config.json: {name} must be a number above 0, not {value!r}")
    return float(value)


def _said(config: Mapping[str, Any], name: str, unsaid: float | None) -> Any:
    value = unsaid if config.get(name) is None else config[name]
    if value is None:
        raise TargetError(f"the target's config.json has no field '{name}'")
    return value


def head_dim(config: Mapping[str, Any]) -> int:
    """`head_dim` where the file has it, else hidden_size / num_attention_heads."""
    if config.get("head_dim") is not None:
        return field(config, "head_dim")
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
    for part in dict.fromkeys(layer.feed_forward for layer in layers):
        if isinstance(part, Experts):
            _check_routing(part)
    return DecoderDims(
        **{
            "vocab_size": field(config, "vocab_size"),
            "hidden_size": field(config, "hidden_size"),
            "norm_eps": number(config, "rms_norm_eps"),
            "max_length": field(config, "max_position_embeddings"),
            "layers": tuple(layers),
            "tied_head": bool(field(config, "tie_word_embeddings", False)),
        }
        | switches
    )


def _check_routing(experts: Experts) -> None:
    E, router = experts.num_experts, experts.router
    if not 1 <= router.top_k <= E:
        raise TargetError(f"config.json: a token cannot choose {router.top_k} of {E} experts")
    if E % router.groups or not 1 <= router.top_groups <= router.groups:
        raise TargetError(
            f"config.json: {E} experts cannot be chosen from the best {router.top_groups} of "
            f"{router.groups} groups"
        )


def layer_numbers(config: Mapping[str, Any], name: str) -> Sequence[int] | None:
    """The layers that field `name` lists, None where it is missing; TargetError for no layer's."""
    found, count = config.get(name), field(config, "num_hidden_layers")
    if found is None:
        return None
    if not isinstance(found, Sequence) or any(layer not in range(count) for layer in found):
        raise TargetError(f"config.json: {name} must list layers from 0 to {count - 1}: {found!r}")
    return found


def require(config: Mapping[str, Any], **known: Any) -> None:
    """TargetError where a field is there and has another value than the one that is known."""
    for name, value in known.items():
        if config.get(name, value) not in (value, None):
            raise TargetError(
                f"config.json: {name} {config[name]!r} is not known for "
                f"{config['model_type']}, only {value!r}"
            )


def attention(config: Mapping[str, Any], **switches: Any) -> Attention:
    """Softmax attention with the usual fields; `switches` are the family's."""
    heads = field(config, "num_attention_heads")
    kv_heads = field(config, "num_key_value_heads", heads)
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


def latent_attention(config: Mapping[str, Any]) -> LatentAttention:
    """DeepSeek's attention: yarn's `mscale_all_dim` also sharpens the scores."""
    scaling = _scaling(config)
    nope_dim, rope_dim = field(config, "qk_nope_head_dim"), field(config, "qk_rope_head_dim")
    sharpening = 1.0
    if scaling.get("rope_type", "default") != "default" and scaling.get("mscale_all_dim"):
        sharpening = _mscale(_scaling_field(scaling, "factor"), scaling["mscale_all_dim"])
    return LatentAttention(
        num_heads=field(config, "num_attention_heads"),
        q_rank=field(config, "q_lora_rank", 0),
        kv_rank=field(config, "kv_lora_rank"),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=field(config, "v_head_dim"),
        rope=rope(config, size=rope_dim, interleaved=field(config, "rope_interleave", True)),
        scale=(nope_dim + rope_dim) ** -0.5 * sharpening**2,
        bias=field(config, "attention_bias", False),
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
    found = config.get(name) or unsaid
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise TargetError(f"config.json: {name} must list the kind of every layer, not {found!r}")
    if len(found) != field(config, "num_hidden_layers"):
        raise TargetError(
            f"config.json: {name} has the kinds of {len(found)} layers, num_hidden_layers is "
            f"{config['num_hidden_layers']}"
        )
    unknown = [kind for kind in found if kind not in known]
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
        texts = [name for name in scaling if name != "rope_type" and isinstance(scaling[name], str)]
        if texts:
            raise TargetError(
                f"config.json: {texts[0]} must be a number, not {scaling[texts[0]]!r}"
            )
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
    _scaling_field(scaling, "long_factor")  # not used; a file without them is damaged
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
    scaling, name = _scaling(config), "original_max_position_embeddings"
    if scaling.get("rope_type", "default") == "default":
        return field(config, "max_position_embeddings")
    return field(config, name) if name in config else field(scaling, name)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_cos_scale(scaling: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1, unless the file gives it or its two mscales (DeepSeek's form)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return _mscale(factor, scaling["mscale"]) / _mscale(factor, scaling["mscale_all_dim"])
    return _mscale(factor, 1.0)
