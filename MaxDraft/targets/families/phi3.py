"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another; longrope, partial rotary."""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import Part, TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Layer, TargetError
from MaxDraft.targets.families.glm4 import fused_mlp
from MaxDraft.targets.fields import field

MODEL_TYPES = ("phi3",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"phi3": {"original_max_position_embeddings": 4096, "rope_theta": 10_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    rope = hf_config.rope(config, partial=1.0)
    if rope.rope_type not in ("default", "longrope"):
        raise TargetError(f"config.json: rope scaling '{rope.rope_type}' is not known for phi3")
    mixer = hf_config.attention(config, rope=rope, window=field(config, "sliding_window"))
    q_size, kv_size = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    starts = {"q": 0, "k": q_size, "v": q_size + kv_size}
    mlp = hf_config.mlp(config)
    return hf_config.decoder(
        config,
        [Layer(mixer, mlp)] * field(config, "num_hidden_layers"),
        names=(
            *(
                (
                    name,
                    (
                        TensorLayout(
                            "self_attn.qkv_proj.weight", True, Part(start, q_size + 2 * kv_size)
                        ),
                    ),
                )
                for name, start in starts.items()
            ),
            *fused_mlp(mlp.intermediate_size),
        ),
    )
