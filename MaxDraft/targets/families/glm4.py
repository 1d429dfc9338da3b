"""GLM-4-0414 (dense): half of every head is rotated, in interleaved pairs; sandwich norms."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import Part, TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer
from MaxDraft.targets.fields import field

MODEL_TYPES = ("glm4",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"glm4": {"attention_bias": True, "rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    mixer = hf_config.attention(
        config,
        rope=hf_config.rope(config, partial=0.5, interleaved=True),
        qkv_bias=field(config, "attention_bias"),
    )
    layer = Layer(mixer, hf_config.mlp(config), post_norms=True)
    return hf_config.decoder(
        config,
        [layer] * field(config, "num_hidden_layers"),
        names=(
            ("attention_post_norm", (TensorLayout("post_self_attn_layernorm.weight"),)),
            ("mlp_post_norm", (TensorLayout("post_mlp_layernorm.weight"),)),
            *fused_mlp(layer.feed_forward.intermediate_size),
        ),
    )


def fused_mlp(size: int) -> tuple[tuple[str, tuple[TensorLayout, ...]], ...]:
    """The layouts of gate and up, of `size` outputs each, one after the other in one tensor."""
    name = "mlp.gate_up_proj.weight"
    return (
        ("mlp/gate", (TensorLayout(name, True, Part(0, 2 * size)),)),
        ("mlp/up", (TensorLayout(name, True, Part(size, 2 * size)),)),
    )
