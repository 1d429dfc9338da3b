"""Reading a Hugging Face config.json: fields that must be there, and the two spellings of rope.

Older files have `rope_theta` and `rope_scaling` at the top level, transformers 5 writes
`rope_parameters`. Both are read, a file that has both must say the same twice, and nothing falls
back to a silent default: wrong angles give wrong features without any error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.rope import Rope
from MaxDraft.targets.decoder import TargetError


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


def require_silu(config: Mapping[str, Any]) -> None:
    """TargetError for an activation that is not SiLU."""
    if config.get("hidden_act", "silu") != "silu":
        raise TargetError(f"hidden_act '{config['hidden_act']}': only silu is known")


def refuse_sliding_window(config: Mapping[str, Any]) -> None:
    """TargetError where some layer attends inside a window: this decoder attends to everything."""
    windowed = config.get("use_sliding_window") or any(
        kind != "full_attention" for kind in config.get("layer_types") or ()
    )
    if windowed:
        raise TargetError("config.json asks for sliding-window attention, which is not supported")


def rope(config: Mapping[str, Any]) -> Rope:
    """Rotary embedding of the target."""
    old = dict(config.get("rope_scaling") or {})
    if config.get("rope_theta") is not None:
        old["rope_theta"] = config["rope_theta"]
    new = dict(config.get("rope_parameters") or {})
    for scaling in (old, new):
        if "type" in scaling:  # the spelling before rope_type
            if scaling.setdefault("rope_type", scaling["type"]) != scaling["type"]:
                raise TargetError(
                    f"config.json contradicts itself: rope type '{scaling['type']}' and rope_type "
                    f"'{scaling['rope_type']}'"
                )
            del scaling["type"]
        if scaling.keys() - {"rope_theta", "rope_type", "partial_rotary_factor"}:
            _scaling_field(scaling, "rope_type")
    differing = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if differing:
        raise TargetError(
            f"config.json contradicts itself: rope_parameters and rope_theta/rope_scaling differ "
            f"in {differing}"
        )
    scaling = {**old, **new}
    if "rope_theta" not in scaling:
        raise TargetError("config.json has neither 'rope_theta' nor 'rope_parameters.rope_theta'")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise TargetError("partial_rotary_factor: partial rotary embeddings are not supported")
    return _with_scaling(scaling, head_dim(config), config)


def _with_scaling(scaling: Mapping[str, Any], size: int, config: Mapping[str, Any]) -> Rope:
    kind = scaling.get("rope_type", "default")
    common = {"theta": float(scaling["rope_theta"]), "head_dim": size, "kind": kind}
    if kind == "default":
        return Rope(**common)
    if kind not in ("linear", "llama3", "yarn"):
        raise TargetError(
            f"rope scaling '{kind}' is not supported; known are default, linear, llama3 and yarn"
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


def _yarn_cos_scale(scaling: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1, unless the file gives it or its two mscales (DeepSeek's form)."""

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)
