"""Qwen2-MoE and Qwen3-MoE (30B-A3B, 235B-A22B, Coder): top-k experts, some dense layers.

Qwen2-MoE adds a shared expert, weighted by a gate of its own, and biases on q, k and v.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from MaxDraft.layers.params import TensorLayout
from MaxDraft.targets import hf_config
from MaxDraft.targets.dims import DecoderDims, Experts, Layer, Mlp, Router, TargetError
from MaxDraft.targets.fields import field

MODEL_TYPES = ("qwen2_moe", "qwen3_moe")
# What absent fields mean in this family (targets/fields.py has what they mean in all).
DEFAULTS = {
    "qwen2_moe": {"qkv_bias": True, "rope_theta": 10_000.0},
    "qwen3_moe": {"rope_theta": 10_000.0},
}
SHARED = tuple(
    (f"experts/shared/{part}", (TensorLayout(f"mlp.shared_expert.{part}_proj.weight", True),))
    for part in ("gate", "up", "down")
)


def dims(config: Mapping[str, Any]) -> DecoderDims:
    """Dimensions from config.json; TargetError where a field is missing or not supported."""
    if config["model_type"] == "qwen2_moe":
        switches = {"qkv_bias": field(config, "qkv_bias")}
    else:
        bias = field(config, "attention_bias")
        switches = {"qkv_bias": bias, "output_bias": bias, "qk_norm": "head"}
    windows = hf_config.qwen_windows(config)
    if config["model_type"] == "qwen3_moe" and len({bool(window) for window in windows}) > 1:
        raise TargetError(
            "config.json: layer_types has layers of both kinds, qwen3_moe has one window for all"
        )
    mixers = [hf_config.attention(config, window=window, **switches) for window in windows]
    parts = zip(mixers, feed_forwards(config), strict=True)
    return hf_config.decoder(config, [Layer(*pair) for pair in parts], names=SHARED)


def feed_forwards(config: Mapping[str, Any]) -> Sequence[Mlp | Experts]:
    """Experts in every `decoder_sparse_step`th layer that is not in `mlp_only_layers`."""
    moe, mlp = experts(config), hf_config.mlp(config)
    every = field(config, "decoder_sparse_step")
    dense = hf_config.layer_numbers(config, "mlp_only_layers") or ()
    return [
        moe if i not in dense and (i + 1) % every == 0 else mlp
        for i in range(field(config, "num_hidden_layers"))
    ]


def experts(config: Mapping[str, Any]) -> Experts:
    """Softmax over all experts, the best k, their weights normalized if `norm_topk_prob`."""
    # Of these families only Qwen3-MoE has no shared expert.
    has_none = config["model_type"] == "qwen3_moe"
    shared = 0 if has_none else field(config, "shared_expert_intermediate_size")
    name = "num_local_experts" if config.get("num_experts") is None else "num_experts"
    return Experts(
        num_experts=field(config, name),
        intermediate_size=field(config, "moe_intermediate_size"),
        router=Router(
            top_k=field(config, "num_experts_per_tok"),
            norm_topk_prob=field(config, "norm_topk_prob"),
        ),
        activation=hf_config.activation(config),
        shared_intermediate_size=shared,
        shared_gate=bool(shared),
    )
