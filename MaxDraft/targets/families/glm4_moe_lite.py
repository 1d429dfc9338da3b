"""GLM-4.7-Flash: DeepSeek-V3's latent attention and routing."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.families import deepseek
from MaxDraft.targets.fields import field

MODEL_TYPES = ("glm4_moe_lite",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {
    "glm4_moe_lite": {
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "rope_theta": 10_000.0,
    }
}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    count = field(config, "num_hidden_layers")
    dense = field(config, "first_k_dense_replace")
    first = ["dense"] * dense + ["sparse"] * (count - dense)
    kinds = hf_config.layer_kinds(config, ("dense", "sparse"), first, "mlp_layer_types")
    feed_forward = {
        "dense": hf_config.mlp(config),
        "sparse": deepseek.experts(config, deepseek.sigmoid_router(config)),
    }
    mixer = hf_config.mla(config)
    return hf_config.decoder(config, [Layer(mixer, feed_forward[kind]) for kind in kinds])
