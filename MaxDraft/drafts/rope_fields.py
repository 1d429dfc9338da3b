"""A rotary embedding as config.json fields: the way back from targets/hf_rope.rope."""

from __future__ import annotations

import math
from typing import Any

from MaxDraft.layers.rope import Rope


def rope_fields(rope: Rope) -> tuple[float, dict[str, Any] | None, dict[str, Any]]:
    """-> rope_theta, rope_scaling (None: no scaling), rope_parameters.

    Older readers take the first two, transformers 5 the third; each alone reads back as `rope`.
    """
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.rope_type == "yarn":
        scaling["beta_fast"] = rope.beta_fast
        scaling["beta_slow"] = rope.beta_slow
        # Engines spell these two differently, so they are written only where they differ from
        # what every engine takes without them.
        if not rope.truncate:
            scaling["truncate"] = False
        default_scaling = 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
        if rope.attention_scaling != default_scaling:
            scaling["attention_factor"] = rope.attention_scaling
    parameters = {"rope_theta": rope.theta, **scaling}
    return rope.theta, (None if rope.rope_type == "default" else scaling), parameters
