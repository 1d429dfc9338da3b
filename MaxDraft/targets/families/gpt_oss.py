"""gpt-oss: attention sinks, windows in every other layer, yarn, experts with clipped SwiGLU.

The files hold all experts of a layer in one tensor, gate and up in alternating columns.
"""

from collections.abc import Mapping
from typing import Any

from MaxDraft.layers.params import Part, TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Experts, Layer, Router, TargetError
from MaxDraft.targets.fields import field, require

MODEL_TYPES = ("gpt_oss",)
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {"gpt_oss": {"attention_bias": True, "rope_theta": 150_000.0}}


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    require(config, swiglu_limit=7.0, swiglu_alpha=1.702)
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        raise TargetError("config.json has neither 'rope_scaling' nor 'rope_parameters'")
    bias = field(config, "attention_bias")
    switches = {"qkv_bias": bias, "output_bias": bias, "sinks": True}
    size = field(config, "intermediate_size")
    moe = Experts(
        num_experts=field(config, "num_local_experts"),
        intermediate_size=size,
        router=Router(field(config, "num_experts_per_tok"), "softmax_top", bias=True),
        activation="clipped",
        bias=True,
    )
    kinds = [
        "full_attention" if i % 2 else "sliding_attention"
        for i in range(field(config, "num_hidden_layers"))
    ]
    layers = [
        Layer(hf_config.attention(config, window=window, **switches), moe)
        for window in hf_config.windows(config, absent=kinds)
    ]
    gate, up, experts = Part(0, 2 * size, 2), Part(1, 2 * size, 2), "mlp.experts."
    return hf_config.decoder(
        config,
        layers,
        names=(
            ("experts/router", (TensorLayout("mlp.router.weight", True),)),
            ("experts/gate", (TensorLayout(experts + "gate_up_proj", part=gate),)),
            ("experts/up", (TensorLayout(experts + "gate_up_proj", part=up),)),
            ("experts/down", (TensorLayout(experts + "down_proj"),)),
            ("experts/gate_bias", (TensorLayout(experts + "gate_up_proj_bias", part=gate),)),
            ("experts/up_bias", (TensorLayout(experts + "gate_up_proj_bias", part=up),)),
            ("experts/down_bias", (TensorLayout(experts + "down_proj_bias"),)),
        ),
    )
