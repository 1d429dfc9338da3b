"""Fields of a config.json: of the right kind, or an error that names the field and its value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from MaxDraft.targets.dims import TargetError


def field(
    config: Mapping[str, Any], name: str, unsaid: int | None = None, *, least: int = 1
) -> int:
    """config[name], a whole number of at least `least`.

    Missing or null: `unsaid`. TargetError naming the field where there is no such, or where it is
    something else.
    """
    value = config.get(name)
    if value is None:
        return _unsaid(name, unsaid)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (value < least and value != unsaid):
        raise TargetError(
            f"config.json: {name} must be a whole number of {least} or more, not {value!r}"
        )
    return value


def flag(config: Mapping[str, Any], name: str, unsaid: bool | None = None) -> bool:
    """config[name], true or false, in the way of `field`."""
    value = config.get(name)
    if value is None:
        return _unsaid(name, unsaid)
    if not isinstance(value, bool):
        raise TargetError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def number(config: Mapping[str, Any], name: str, unsaid: float | None = None) -> float:
    """config[name], a positive number, in the way of `field`."""
    value = config.get(name)
    if value is None:
        return float(_unsaid(name, unsaid))
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not known or (value <= 0 and value != unsaid):
        raise TargetError(f"config.json: {name} must be a number above 0, not {value!r}")
    return float(value)


def mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """config[name], a JSON object of fields; {} where it is missing or null."""
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TargetError(f"config.json: {name} must be an object of fields, not {value!r}")
    return value


def listed(config: Mapping[str, Any], name: str) -> Sequence[Any] | None:
    """config[name], a list; None where it is missing or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise TargetError(f"config.json: {name} must be a list, not {value!r}")
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


def require(config: Mapping[str, Any], **known: Any) -> None:
    """TargetError where a field is there and has another value than the one that is known."""
    for name, value in known.items():
        if config.get(name, value) not in (value, None):
            raise TargetError(
                f"config.json: {name} {config[name]!r} is not known for "
                f"{config['model_type']}, only {value!r}"
            )


def _unsaid(name: str, unsaid: Any) -> Any:
    if unsaid is None:
        raise TargetError(f"the target's config.json has no field '{name}'")
    return unsaid
