"""Mistral 7B and Small: Llama, in older versions with a window in every layer."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.fields import field

MODEL_TYPES = ("mistral",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"mistral": {"sliding_window": 4096, "rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    mixer = hf_config.attention(config, window=field(config, "sliding_window"))
    layer = Layer(mixer, hf_config.mlp(config))
    return hf_config.decoder(config, [layer] * field(config, "num_hidden_layers"))
