"""GLM-4.5, 4.6, 4.7 and their Air: half of every head is rotated, DeepSeek-V3's routing."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.families import deepseek
from MaxDraft.targets.fields import field

MODEL_TYPES = ("glm4_moe",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"glm4_moe": {"n_group": 1, "topk_group": 1, "rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    mixer = hf_config.attention(
        config,
        rope=hf_config.rope(config, partial=0.5),
        qkv_bias=field(config, "attention_bias"),
        qk_norm="head" if field(config, "use_qk_norm") else "",
    )
    moe = deepseek.experts(config, deepseek.sigmoid_router(config))
    mlp, dense = hf_config.mlp(config), field(config, "first_k_dense_replace")
    layers = [
        Layer(mixer, mlp if i < dense else moe) for i in range(field(config, "num_hidden_layers"))
    ]
    return hf_config.decoder(config, layers)
