"""Reads the rotary embedding of a config.json.

Older files have `rope_theta` and `rope_scaling` at the top level, transformers 5 writes
`rope_parameters`. Both are read; a file that has both must give the same values twice; a key that
is not known for its type of scaling is an error. Nothing falls back to a silent default: wrong
angles give wrong hidden states without any error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from MaxDraft.layers.rope import Rope, frequencies
from MaxDraft.targets.dims import TargetError
from MaxDraft.targets.fields import default, field, head_dim, listed, mapping, shown

_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, set[str]] = {  # by rope_type; no other key is read
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", _ORIGINAL, "attention_factor", "short_factor", "long_factor"},
}
_PLAIN_KEYS = {"rope_theta", "rope_type", "partial_rotary_factor"}
_IMAGE_KEYS = {"mrope_section", "mrope_interleaved"}  # without effect on text alone
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
    """The rotary embedding of heads of `size` dimensions; None: of head_dim.

    partial: the partial_rotary_factor of a file that does not have it; None: the family rotates
    whole heads, whatever a file says. TargetError where a field is missing, contradicts another, or
    is not computed here as transformers computes it.
    """
    fields = rope_fields(config)
    if "rope_theta" not in fields:
        raise TargetError("config.json has neither 'rope_theta' nor 'rope_parameters.rope_theta'")
    rope_type = fields.get("rope_type", default("rope_type"))
    plain = Rope(
        theta=field(fields, "rope_theta"),
        rotary_dim=_rotary_dim(config, fields, size or head_dim(config), partial),
        interleaved=interleaved,
    )
    match rope_type:
        case "default":
            result = plain
        case "dynamic":
            # The base grows for sequences longer than max_position_embeddings only, and no longer
            # ones are served (DecoderDims.max_length): up to there it is the default embedding.
            _required(fields, "factor")
            result = plain
        case "linear":
            result = dataclasses.replace(
                plain, rope_type="linear", factor=_required(fields, "factor")
            )
        case "llama3":
            result = _llama3(fields, plain)
        case "yarn":
            result = _yarn(fields, plain)
        case "longrope":
            result = _longrope(fields, config, plain)
    _check_frequencies(result)
    return result


def _llama3(fields: Mapping[str, Any], plain: Rope) -> Rope:
    low, high = (_required(fields, f"{end}_freq_factor") for end in ("low", "high"))
    if low > high:
        raise TargetError(f"config.json: low_freq_factor {low} is above high_freq_factor {high}")
    return dataclasses.replace(
        plain,
        rope_type="llama3",
        factor=_required(fields, "factor"),
        original_max_position_embeddings=_required(fields, _ORIGINAL),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: Mapping[str, Any], plain: Rope) -> Rope:
    if plain.theta <= 1:
        raise TargetError(f"config.json: rope_theta {plain.theta} is too small for yarn")
    factor = _required(fields, "factor")
    return dataclasses.replace(
        plain,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=_required(fields, _ORIGINAL),
        beta_fast=field(fields, "beta_fast"),
        beta_slow=field(fields, "beta_slow"),
        truncate=field(fields, "truncate"),
        attention_scaling=_yarn_attention_scaling(fields, factor),
    )


def _longrope(fields: Mapping[str, Any], config: Mapping[str, Any], plain: Rope) -> Rope:
    """LongRoPE with the short factors, those of sequences no longer than the original length.

    Which factors hold depends on the length of the whole sequence; hf_config.decoder ends
    max_length where the short ones end.
    """
    pairs = plain.rotary_dim // 2
    for name in ("short_factor", "long_factor"):  # the latter is not used, but shows damage
        _has(fields, name)
        factors = listed(fields, name)
        if len(factors) != pairs:
            raise TargetError(
                f"config.json: the rope scaling has {len(factors)} {name.replace('_', ' ')}s "
                f"for {pairs} pairs"
            )
        for factor in factors:
            if (
                isinstance(factor, bool)
                or not isinstance(factor, int | float)
                or not (2.0**-100 < factor < 2.0**100)
            ):
                raise TargetError(
                    f"config.json: {name} must be a list of numbers above 0, not of {shown(factor)}"
                )
    original = _required(fields, _ORIGINAL)
    factor = field(fields, "factor", field(config, "max_position_embeddings") / original)
    # Ding et al. 2024, as transformers' _compute_longrope_parameters has it.
    scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return dataclasses.replace(
        plain,
        rope_type="longrope",
        original_max_position_embeddings=original,
        short_factor=tuple(float(factor) for factor in fields["short_factor"]),
        attention_scaling=field(fields, "attention_factor", scaling),
    )


def _check_frequencies(rope: Rope) -> None:
    """TargetError where the fields, each in its range, give no frequencies together."""
    try:
        with np.errstate(all="ignore"):
            values = frequencies(rope)
    except (OverflowError, ValueError, ZeroDivisionError):  # of the logarithms of yarn's ramp
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise TargetError(
            f"config.json: the rotary embedding has no finite frequencies: rope_theta {rope.theta} "
            f"and the rope scaling of type '{rope.rope_type}' do not fit together"
        )


def rope_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """All spellings of rope as one dict without nulls; TargetError where they contradict."""
    scaling, parameters = (
        _known_keys(config, name) for name in ("rope_scaling", "rope_parameters")
    )
    beside = {
        name: config[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if config.get(name) is not None
    }
    for name, inner in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        _check_equal(f"{name} and the fields beside it", inner, beside, beside.keys() & inner)
    if scaling and parameters:  # readers take one or the other
        older = scaling | beside
        keys = older.keys() | parameters.keys()
        _check_equal("rope_parameters and rope_scaling", parameters | beside, older, keys)
    fields = beside | scaling | parameters
    rope_type = fields.get("rope_type", default("rope_type"))
    if _ORIGINAL in _KEYS[rope_type] and config.get(_ORIGINAL) is not None:
        top = {_ORIGINAL: config[_ORIGINAL]}
        _check_equal("the rope scaling and the fields beside it", fields, top, top.keys() & fields)
        fields |= top
    return fields


def _known_keys(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """rope_scaling or rope_parameters without nulls, with `rope_type` for either spelling of it."""
    fields = {
        key: value
        for key, value in mapping(config, name).items()
        if value is not None and key not in _IMAGE_KEYS
    }
    if "type" in fields:  # the spelling before rope_type
        if fields.setdefault("rope_type", fields["type"]) != fields["type"]:
            raise TargetError(
                f"config.json contradicts itself: rope type {shown(fields['type'])} and rope_type "
                f"{shown(fields['rope_type'])}"
            )
        del fields["type"]
    if fields.keys() - _PLAIN_KEYS:
        _has(fields, "rope_type")
    if fields.get("rope_type") == "su":  # longrope's first name
        fields["rope_type"] = "longrope"
    rope_type = fields.get("rope_type", default("rope_type"))
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise TargetError(
            f"config.json: rope scaling {shown(rope_type)} is not supported; known are "
            f"{', '.join(_KEYS)}"
        )
    unknown = sorted(fields.keys() - _PLAIN_KEYS - _KEYS[rope_type])
    if unknown:
        raise TargetError(
            f"config.json: {name} has '{unknown[0]}' {shown(fields[unknown[0]])}, which is not "
            f"known for rope_type '{rope_type}'{_HINTS.get(unknown[0], '')}"
        )
    return fields


def _check_equal(
    places: str, one: Mapping[str, Any], other: Mapping[str, Any], keys: Collection[str]
) -> None:
    differing = [
        f"{key} ({shown(one.get(key))} and {shown(other.get(key))})"
        for key in sorted(keys)
        if one.get(key) != other.get(key)
    ]
    if differing:
        raise TargetError(
            f"config.json contradicts itself: {places} differ in {', '.join(differing)}"
        )


def _rotary_dim(
    config: Mapping[str, Any], fields: Mapping[str, Any], size: int, partial: float | None
) -> int:
    """How many of a head's `size` dimensions are rotated: an even number, at least two."""
    name = "partial_rotary_factor"
    if partial and name in config and config[name] is None and name not in fields:
        raise TargetError(f"config.json: {name} is null, which readers take for different numbers")
    share = field(fields, name, partial or default(name))
    if partial is None and share != 1:
        raise TargetError(
            f"config.json: {name} {shown(fields[name])} is not known here: this family rotates "
            f"whole heads"
        )
    rotary_dim = int(size * share)
    if share > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise TargetError(
            f"config.json: {rotary_dim} of a head's {size} dimensions (head_dim x {name} {share}) "
            f"cannot be rotated in pairs"
        )
    return rotary_dim


def _has(fields: Mapping[str, Any], name: str) -> None:
    if name not in fields:
        raise TargetError(f"config.json: the rope scaling {shown(fields)} has no field '{name}'")


def _required(fields: Mapping[str, Any], name: str) -> Any:
    _has(fields, name)
    return field(fields, name)


def mla_score_factor(config: Mapping[str, Any]) -> float:
    """DeepSeek: yarn's `mscale_all_dim` also scales the scores, by the square of this factor."""
    fields = rope_fields(config)
    all_dim = field(fields, "mscale_all_dim")
    return _mscale(_required(fields, "factor"), all_dim) if all_dim else 1.0


def _mscale(factor: float, mscale: float = 1.0) -> float:
    """transformers' get_mscale: 0.1 mscale ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_scaling(fields: Mapping[str, Any], factor: float) -> float:
    """0.1 ln(factor) + 1, unless the file gives it or its two mscales (DeepSeek's form)."""
    mscale, all_dim = (field(fields, name) for name in ("mscale", "mscale_all_dim"))
    if mscale and all_dim:
        scaling = _mscale(factor, mscale) / _mscale(factor, all_dim)
    else:
        scaling = _mscale(factor)
    return field(fields, "attention_factor", scaling)
