"""Reading a config.json's rotary embedding.

Older files have `rope_theta` and `rope_scaling` at the top level, transformers 5 writes
`rope_parameters`. Both are read, a file that has both must say the same twice, a key that its kind
of scaling does not know is an error, and nothing falls back to a silent default: wrong angles give
wrong features without any error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.rope import Rope
from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.fields import field, flag, head_dim, listed, mapping, number

_ORIGINAL = "original_max_position_embeddings"
_KEYS = {  # by kind of scaling; nothing else is read
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}
_PLAIN = {"rope_theta", "rope_type", "partial_rotary_factor"}
_IMAGES = {"mrope_section", "mrope_interleaved"}  # text alone is turned as ever
_HINTS = {
    "attn_factor": "; transformers ignores it and serving engines may not: take it out if the "
    "engine that will serve the target ignores it too"
}


def rope(
    config: Mapping[str, Any],
    size: int | None = None,
    *,
    partial: float | None = None,
    interleaved: bool = False,
) -> Rope:
    """Rotary embedding of heads of `size` dimensions; None: the usual head_dim.

    partial: the share of a head that is turned where the file does not say it; None: the family
    turns whole heads, whatever a file says.
    """
    said = scaling(config)
    if "rope_theta" not in said:
        raise TargetError("config.json has neither 'rope_theta' nor 'rope_parameters.rope_theta'")
    kind = said.get("rope_type", "default")
    common = {
        "theta": number(said, "rope_theta"),
        "rotary_dim": _rotary_dim(config, said, size or head_dim(config), partial),
        "rope_type": kind,
        "interleaved": interleaved,
    }
    if kind == "default":
        return Rope(**common)
    if kind == "longrope":
        return _longrope(said, config, common)
    common["factor"] = _number(said, "factor")
    if kind == "linear":
        return Rope(**common)
    common[_ORIGINAL] = field(_there(said, _ORIGINAL), _ORIGINAL)
    if kind == "yarn" and common["theta"] <= 1:
        raise TargetError(f"config.json: rope_theta {common['theta']} is too small for yarn")
    if kind == "llama3":
        low, high = _number(said, "low_freq_factor"), _number(said, "high_freq_factor")
        if low > high:
            raise TargetError(
                f"config.json: low_freq_factor {low} is above high_freq_factor {high}"
            )
        return Rope(**common, low_freq_factor=low, high_freq_factor=high)
    return Rope(
        **common,
        beta_fast=number(said, "beta_fast", 32.0),
        beta_slow=number(said, "beta_slow", 1.0),
        truncate=flag(said, "truncate", True),
        attention_scaling=_yarn_attention_scaling(said, common["factor"]),
    )


def scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """All spellings of rope as one dict without nulls; TargetError where they contradict."""
    scaled, new = _spelled(config, "rope_scaling"), _spelled(config, "rope_parameters")
    outer = {
        name: config[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if config.get(name) is not None
    }
    for name, inner in (("rope_scaling", scaled), ("rope_parameters", new)):
        _agree(f"{name} and the fields beside it", inner, outer, outer.keys() & inner.keys())
    if scaled and new:  # readers take one or the other
        old = scaled | outer
        _agree("rope_parameters and rope_scaling", new | outer, old, old.keys() | new.keys())
    said = outer | scaled | new
    if _ORIGINAL in _KEYS[said.get("rope_type", "default")] and config.get(_ORIGINAL) is not None:
        top = {_ORIGINAL: config[_ORIGINAL]}
        _agree("the rope scaling and the fields beside it", said, top, top.keys() & said.keys())
        said |= top
    return said


def _spelled(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """rope_scaling or rope_parameters, with known keys only and `rope_type` for the kind."""
    said = {
        key: value
        for key, value in mapping(config, name).items()
        if value is not None and key not in _IMAGES
    }
    if "type" in said:  # the spelling before rope_type
        if said.setdefault("rope_type", said["type"]) != said["type"]:
            raise TargetError(
                f"config.json contradicts itself: rope type '{said['type']}' and rope_type "
                f"'{said['rope_type']}'"
            )
        del said["type"]
    if said.keys() - _PLAIN:
        _there(said, "rope_type")
    if said.get("rope_type") == "su":  # the first name
        said["rope_type"] = "longrope"
    kind = said.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise TargetError(
            f"config.json: rope scaling {kind!r} is not supported; known are {', '.join(_KEYS)}"
        )
    unknown = sorted(said.keys() - _PLAIN - _KEYS[kind])
    if unknown:
        raise TargetError(
            f"config.json: {name} has '{unknown[0]}' {said[unknown[0]]!r}, which is not known for "
            f"rope_type '{kind}'{_HINTS.get(unknown[0], '')}"
        )
    return said


def _agree(places: str, one: Mapping[str, Any], other: Mapping[str, Any], keys: Any) -> None:
    differing = [
        f"{key} ({one.get(key)!r} and {other.get(key)!r})"
        for key in sorted(keys)
        if one.get(key) != other.get(key)
    ]
    if differing:
        raise TargetError(
            f"config.json contradicts itself: {places} differ in {', '.join(differing)}"
        )


def _rotary_dim(
    config: Mapping[str, Any], said: Mapping[str, Any], size: int, partial: float | None
) -> int:
    """Dimensions of a head of `size` that are turned: in pairs, and some."""
    name = "partial_rotary_factor"
    if partial and name in config and config[name] is None and name not in said:
        raise TargetError(f"config.json: {name} is null, which readers take for different numbers")
    share = number(said, name, partial or 1.0)
    if partial is None and share != 1:
        raise TargetError(
            f"config.json: {name} {said[name]!r} is not known here: this family turns whole heads"
        )
    turned = int(size * share)
    if share > 1 or turned < 2 or turned % 2:
        raise TargetError(
            f"config.json: {turned} of a head's {size} dimensions (head_dim x {name} {share}) "
            f"cannot be turned in pairs"
        )
    return turned


def _there(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in said:
        raise TargetError(f"config.json: the rope scaling {dict(said)} has no field '{name}'")
    return said


def _number(said: Mapping[str, Any], name: str) -> float:
    return number(_there(said, name), name)


def _longrope(said: Mapping[str, Any], config: Mapping[str, Any], common: dict[str, Any]) -> Rope:
    """The short factors: those of sequences no longer than the original length.

    Which set holds depends on the length of the whole sequence; hf_config.decoder ends max_length
    where the short ones end.
    """
    pairs = common["rotary_dim"] // 2
    for name in ("short_factor", "long_factor"):  # the latter is not used, but shows damage
        factors = listed(_there(said, name), name)
        if len(factors) != pairs:
            raise TargetError(
                f"config.json: the rope scaling has {len(factors)} {name.replace('_', ' ')}s "
                f"for {pairs} pairs"
            )
        for factor in factors:
            number({name: factor}, name)
    original = field(_there(said, _ORIGINAL), _ORIGINAL, least=2)
    factor = number(said, "factor", field(config, "max_position_embeddings") / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rope(
        **common,
        original_max_position_embeddings=original,
        short_factor=tuple(float(factor) for factor in said["short_factor"]),
        attention_scaling=number(said, "attention_factor", usual),
    )


def latent_sharpening(config: Mapping[str, Any]) -> float:
    """DeepSeek: yarn's `mscale_all_dim` also sharpens the scores."""
    said = scaling(config)
    all_dim = number(said, "mscale_all_dim", 0.0)
    return _mscale(_number(said, "factor"), all_dim) if all_dim else 1.0


def _mscale(factor: float, by: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0


def _yarn_attention_scaling(said: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1, unless the file gives it or its two mscales (DeepSeek's form)."""
    one, all_dim = (number(said, name, 0.0) for name in ("mscale", "mscale_all_dim"))
    two = one and all_dim
    usual = _mscale(factor, one) / _mscale(factor, all_dim) if two else _mscale(factor)
    return number(said, "attention_factor", usual)
