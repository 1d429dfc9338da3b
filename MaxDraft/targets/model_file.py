"""The `target_config` of a model file (configs/models/NAME.yml): published fields of a config.json.

Where releases of one model differ in a single number or flag, the model file lists all values, that
of the release named first in front: `rope_theta: [1000000.0, 10000000.0]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets.dims import DecoderDims
from MaxDraft.targets.fields import FIELDS, default
from MaxDraft.targets.registry import dims_from_config

# It limits the length that is served, in which releases differ, and decides no shape.
_ANY_LENGTH = {"max_position_embeddings": 1 << 30}


def dims_from_target_config(target_config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions of the target that a model file describes, without its config.json."""
    return dims_from_config(_ANY_LENGTH | first_release(target_config))


def first_release(target_config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the release that is named first: one value each."""
    return {name: _first(name, value) for name, value in target_config.items()}


def _first(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return first_release(value)
    return value[0] if name in FIELDS and isinstance(value, list | tuple) else value


def agrees(name: str, expected: Any, value: Any) -> bool:
    """Whether a config.json's `value` is (one of) what a model file has for this field.

    Null stands for what an absent field means.
    """
    name = name.split(".")[-1]  # of full_attention.rope_theta
    value = default(name) if value is None else value
    if isinstance(expected, list | tuple):
        if name in FIELDS:
            return value in expected
        return isinstance(value, list | tuple) and list(value) == list(expected)
    return value == (default(name) if expected is None else expected)
